"""A page for the person at the line: what the stream sees and says, in a browser (the extra ``watch``).

Starlette and uvicorn are loaded when a page is made.
"""

from advrad_fast.line.watch.page import WatchPage

__all__ = ["WatchPage"]
