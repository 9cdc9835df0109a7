"""``python audited.py FOLDER[:FOLDER...] ARGUMENTS``: run ``advrad-fast`` under an audit hook and say what it did wrong.

Not allowed: sockets, other programs, pickles, native libraries from outside the installation, and opening for writing, renaming,
removing or making anything outside the folders.  The last line of standard error is a JSON list of what was seen.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig

FORBIDDEN = (
    "socket.", "subprocess.", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "os.fork", "os.startfile", "pty.", "pickle.",
    "marshal.load", "urllib.", "http.client.", "ftplib.", "smtplib.", "webbrowser.", "shelve.",
)  # fmt: skip
PATHS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.utime")
FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch(allowed: list[str]) -> list[str]:
    """From here on to the end of the process: what is done wrong is added to the list that is returned.

    Args:
        allowed: real paths of what may be written, and below; may be changed.
    """
    installed = {os.path.realpath(p) for p in (*sysconfig.get_paths().values(), sys.base_prefix, "/usr/lib", "/lib", "/lib64")}
    import advrad_fast

    installed |= {os.path.realpath(p) for p in (*advrad_fast.__path__, *(p for p in sys.path if p.endswith("-packages")))}
    seen: list[str] = []

    def inside(path: object, folders: set[str] | list[str]) -> bool:
        if not isinstance(path, str | bytes):
            return True  # a descriptor, opened before
        real = os.path.realpath(os.fsdecode(path))
        return any(real == folder or real.startswith(folder + os.sep) for folder in folders)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event.startswith(FORBIDDEN) and not (event == "marshal.loads" and from_import()):
            seen.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            path, mode, flags = arguments
            writing = bool(flags & FLAGS) if isinstance(flags, int) else any(c in str(mode) for c in "wax+")  # type: ignore[operator]
            if writing and path != os.devnull and not inside(path, allowed):
                seen.append(f"writes {path!r}")
        elif event in PATHS and not inside(arguments[0], allowed):
            seen.append(f"{event} {arguments[0]!r}")
        elif event == "ctypes.dlopen" and os.sep in str(arguments[0]) and not inside(arguments[0], installed):
            seen.append(f"loads {arguments[0]!r}")

    def from_import() -> bool:
        frame = sys._getframe(2)
        return "importlib" in frame.f_code.co_filename

    sys.dont_write_bytecode = True
    sys.addaudithook(hook)
    return seen


def main() -> int:
    seen = watch([os.path.realpath(folder) for folder in sys.argv[1].split(":")])
    from advrad_fast.cli import main as command

    code = command(sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.write("\n" + json.dumps(list(seen)) + "\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
