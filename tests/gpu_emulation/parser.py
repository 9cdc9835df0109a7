"""PTX text -> entries, variables and instructions.

Only what a compiler writes for self-contained kernels is read: no functions besides entries, no calls, no textures.  A directive
that is not known raises, as an opcode does.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gpu_emulation.errors import InvalidModule, UnknownInstruction
from gpu_emulation.formats import Type, integer, is_literal, literal_bits, type_named


@dataclass(frozen=True)
class Register:
    number: int
    name: str
    type: Type


@dataclass(frozen=True)
class Literal:
    text: str


@dataclass(frozen=True)
class Name:
    """A special register, a variable or a label, told apart by who uses it."""

    text: str


@dataclass(frozen=True)
class Vector:
    items: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """``[base + offset]``."""

    base: Register | Name
    offset: int


@dataclass(frozen=True)
class Pair:
    """``p|q``, the two predicates of setp, or a shuffle's value and predicate."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Not:
    """``!p``."""

    of: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a result that is not wanted."""


Operand = Register | Literal | Name | Vector | Address | Pair | Not | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: the first word ("ld").
        modifiers: the words after it (["global", "v4", "b32"]).
        guard: the predicate under which it runs, and whether that is negated.
        line, text: where it stands.
    """

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str

    @property
    def name(self) -> str:
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True)
class Parameter:
    """An entry's parameter: where it lies in the packed buffer."""

    name: str
    type: str
    nbytes: int
    align: int
    offset: int


@dataclass(frozen=True)
class Variable:
    """A variable of a state space ("global", "const", "shared", "local"); 0 bytes: an array whose size the launch gives."""

    name: str
    space: str
    nbytes: int
    align: int
    data: bytes | None  # None: not initialised in the text


@dataclass
class Function:
    """An entry as it stands in the text."""

    name: str
    parameters: list[Parameter] = field(default_factory=list)
    variables: dict[str, Variable] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: list[Register] = field(default_factory=list)
    max_threads: int | None = None
    required_block: tuple[int, ...] | None = None


@dataclass
class Parsed:
    version: str = ""
    target: str = ""
    variables: dict[str, Variable] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)


_NAME = r"[%$A-Za-z_][\w$]*(?:\.[xyzw])?"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
_BLANKS = re.compile(r"(?:\s+|\.(?:loc|file)\b[^\n]*)*")
_LABEL = re.compile(r"([%$A-Za-z_][\w$]*)\s*:(?!:)")
_INSTRUCTION = re.compile(r"(?:@\s*(!?)\s*(%?[\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.S)
_VARIABLE = re.compile(
    r"(?:\.(?:visible|extern|weak|common)\s+)*\.(global|const|shared|local)\s+(?:\.align\s+(\d+)\s+)?"
    r"\.(\w+)\s+([%$\w]+)\s*((?:\[\s*\w*\s*\])*)\s*(?:=\s*(.*))?",
    re.S,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s*(?:\.(?:global|shared|const|local|generic))?\s*(?:\.align\s+\d+)?\s+)?"
    r"([%$\w]+)\s*(?:\[\s*(\d+)\s*\])?"
)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.S)
_REGISTER = re.compile(r"\s*(%?[\w$]+)\s*(?:<\s*(\d+)\s*>)?\s*")


class _Text:
    """The text without comments, and a position in it."""

    def __init__(self, text: str) -> None:
        self.text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
        self.at = 0
        self._newlines = [match.start() for match in re.finditer("\n", self.text)]

    def skip(self) -> bool:
        """Moves over blanks and line directives; False at the end."""
        self.at = _BLANKS.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches nothing, too
        return self.at < len(self.text)

    def line(self) -> int:
        return bisect_left(self._newlines, self.at) + 1

    def take(self, pattern: str) -> re.Match[str] | None:
        match = re.compile(pattern, re.S).match(self.text, self.at)
        if match:
            self.at = match.end()
        return match

    def until(self, end: str) -> str:
        """The text up to ``end``, which is passed over."""
        stop = self.text.find(end, self.at)
        if stop < 0:
            raise InvalidModule(f"line {self.line()}: no {end!r} after this")
        found = self.text[self.at : stop]
        self.at = stop + len(end)
        return found

    def braces(self) -> None:
        """Passes over a balanced { ... }."""
        depth = 0
        while True:
            if self.at >= len(self.text):
                raise InvalidModule("a brace is not closed")
            depth += {"{": 1, "}": -1}.get(self.text[self.at], 0)
            self.at += 1
            if depth == 0:
                return


def parse(text: str) -> Parsed:
    """Reads a module.

    Raises:
        InvalidModule, UnknownInstruction: with the line.
    """
    source, module = _Text(text.rstrip("\0")), Parsed()
    while source.skip():
        line = source.line()
        try:
            _top(source, module)
        except InvalidModule as error:
            if not str(error).startswith("line "):
                raise type(error)(f"line {line}: {error}") from None
            raise
    if not module.version or not module.target:
        raise InvalidModule("no .version or no .target")
    return module


def _top(source: _Text, module: Parsed) -> None:
    if match := source.take(r"\.version\s+(\d+\.\d+)"):
        module.version = match[1]
    elif match := source.take(r"\.target\s+(\w+)((?:\s*,\s*\w+)*)"):
        module.target = match[1]
        unknown = {word.strip() for word in match[2].split(",")} - {"", "debug", "texmode_independent"}
        if unknown:
            raise UnknownInstruction(f".target {', '.join(sorted(unknown))}")
    elif match := source.take(r"\.address_size\s+(\d+)"):
        if match[1] != "64":
            raise UnknownInstruction(f".address_size {match[1]}")
    elif source.take(r"\.section\s+\.?\w+\s*(?=\{)"):
        source.braces()
    elif source.take(r"(?:\.(?:visible|weak)\s+)*\.entry\b"):
        function = _entry(source, module)
        module.functions[function.name] = function
    elif source.take(r"\.extern\s+\.func\b[^;{]*;"):
        pass  # a declaration does nothing; a call would raise
    elif match := source.take(r"(?:\.(?:visible|extern|weak|common)\s+)*\.(?:global|const|shared)\b"):
        source.at = match.start()
        variable = _variable(source.until(";"))
        module.variables[variable.name] = variable
    else:
        raise UnknownInstruction(f"unknown directive {source.text[source.at :].split(None, 1)[0][:40]!r}")


def _variable(text: str) -> Variable:
    match = _VARIABLE.fullmatch(text.strip())
    if match is None:
        raise UnknownInstruction(f"declaration {text.strip()[:60]!r}")
    space, align, kind, name, dimensions, values = match.groups()
    element = type_named(kind)
    if element.kind == "p":
        raise InvalidModule("a predicate variable")
    counts = [integer(count or "0") for count in re.findall(r"\[\s*(\w*)\s*\]", dimensions)]
    nbytes = element.nbytes * int(np.prod([count or 0 for count in counts], dtype=np.int64))
    data = None
    if values is not None:
        words = [word.strip() for word in re.sub(r"[{}]", " ", values).split(",") if word.strip()]
        if not all(is_literal(word) for word in words):
            raise UnknownInstruction(f"the initial value of {name} is not a list of numbers")
        data = b"".join(literal_bits(word, element).to_bytes(element.nbytes, "little") for word in words)
        data = data.ljust(nbytes, b"\0")
    return Variable(name, space, nbytes, int(align or element.nbytes), data)


def _parameters(text: str) -> list[Parameter]:
    found: list[Parameter] = []
    offset = 0
    for part in filter(str.strip, text.split(",")):
        match = _PARAMETER.fullmatch(part.strip())
        if match is None:
            raise UnknownInstruction(f"parameter {part.strip()!r}")
        align, kind, name, count = match.groups()
        element = type_named(kind)
        step = int(align or element.nbytes)
        offset = -(-offset // step) * step
        nbytes = element.nbytes * int(count or 1)
        found.append(Parameter(name, kind, nbytes, step, offset))
        offset += nbytes
    return found


def _entry(source: _Text, module: Parsed) -> Function:
    match = source.take(r"\s*([%$\w]+)\s*")
    if match is None:
        raise InvalidModule("an entry without a name")
    function = Function(match[1])
    if source.take(r"\("):
        function.parameters = _parameters(source.until(")"))
    while source.skip() and not source.take(r"\{"):
        if match := source.take(r"\.(maxntid|reqntid)\s+(\d+)((?:\s*,\s*\d+)*)"):
            shape = tuple(int(word) for word in (match[2] + match[3]).split(","))
            function.max_threads = int(np.prod(shape))
            if match[1] == "reqntid":
                function.required_block = shape
        elif source.take(r"\.(?:minnctapersm|maxnctapersm|maxnreg)\s+\d+"):
            pass  # hints to the assembler about occupancy
        else:
            raise UnknownInstruction(f"unknown directive {source.text[source.at :].split(None, 1)[0][:40]!r}")
    _Body(source, function).read()
    return function


class _Body:
    """Reads the statements of one entry; a block in braces has registers of its own."""

    def __init__(self, source: _Text, function: Function) -> None:
        self.source = source
        self.function = function
        self.scopes: list[dict[str, Register]] = [{}]

    def read(self) -> None:
        source, function = self.source, self.function
        while True:
            if not source.skip():
                raise InvalidModule(f"entry {function.name} does not end")
            if source.take(r"\{"):
                self.scopes.append({})
            elif source.take(r"\}"):
                self.scopes.pop()
                if not self.scopes:
                    return
            elif match := source.take(_LABEL.pattern):
                if match[1] in function.labels:
                    raise InvalidModule(f"line {source.line()}: two labels {match[1]}")
                function.labels[match[1]] = len(function.instructions)
            elif source.take(r";"):
                pass
            else:
                line = source.line()
                statement = source.until(";").strip()
                try:
                    self.statement(statement, line)
                except InvalidModule as error:
                    raise type(error)(f"line {line}: {error} in {' '.join(statement.split())!r}") from None

    def statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith((".shared", ".local", ".extern")):
            variable = _variable(text)
            self.function.variables[variable.name] = variable
        elif text.startswith(".pragma"):
            pass  # hints to the assembler
        elif text.startswith("."):
            raise UnknownInstruction(f"unknown directive {text.split(None, 1)[0]}")
        else:
            self.function.instructions.append(self.instruction(text, line))

    def declare(self, text: str) -> None:
        match = _REGISTERS.fullmatch(text)
        if match is None:
            raise UnknownInstruction("register declaration")
        kind = type_named(match[1])
        for part in match[2].split(","):
            one = _REGISTER.fullmatch(part)
            if one is None:
                raise UnknownInstruction("register declaration")
            names = [one[1]] if one[2] is None else [f"{one[1]}{i}" for i in range(int(one[2]))]
            for name in names:
                register = Register(len(self.function.registers), name, kind)
                self.function.registers.append(register)
                self.scopes[-1][name] = register

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return None

    def instruction(self, text: str, line: int) -> Instruction:
        match = _INSTRUCTION.fullmatch(text)
        if match is None:
            raise UnknownInstruction("not an instruction")
        negation, guard_name, opcode, dotted, rest = match.groups()
        guard = None
        if guard_name is not None:
            guard = self.register(guard_name)
            if guard is None or guard.type.kind != "p":
                raise InvalidModule(f"{guard_name} is no predicate")
        operands = tuple(self.operand(part) for part in _split(rest))
        modifiers = tuple(dotted.split(".")[1:])
        return Instruction(opcode, modifiers, operands, guard, bool(negation), line, " ".join(text.split()))

    def operand(self, text: str) -> Operand:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in _split(text.strip("{} \t\n"))))
        if text.startswith("["):
            return self.address(text[1:-1].strip())
        if "|" in text:
            first, second = text.split("|")
            return Pair(self.operand(first.strip()), self.operand(second.strip()))
        if text.startswith("!"):
            return Not(self.operand(text[1:].strip()))
        if is_literal(text):
            return Literal(text)
        if not re.fullmatch(_NAME, text):
            raise UnknownInstruction(f"operand {text!r}")
        return self.register(text) or Name(text)

    def address(self, text: str) -> Address:
        match = re.fullmatch(rf"({_NAME})\s*(?:([+-])\s*(-?\w+))?", text)
        offset = integer(match[3]) if match and match[3] else 0
        if match is None or offset is None:
            raise UnknownInstruction(f"address [{text}]")
        base = self.register(match[1]) or Name(match[1])
        return Address(base, -offset if match[2] == "-" else offset)


def _split(text: str) -> Iterator[str]:
    """Operands between commas that stand in no bracket."""
    depth, start = 0, 0
    for i, letter in enumerate(text):
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            yield text[start:i].strip()
            start = i + 1
    if text[start:].strip():
        yield text[start:].strip()
