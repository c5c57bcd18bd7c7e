"""Reads pickles of plain data. A file cannot make this program run code.

A pickle is a program for a small virtual machine. Python's own machine (`private.PythonUnpickler`) runs here with only
the instructions that make lists, dicts, tuples, text and numbers; instructions that look up a name, call a function or
build an object are missing. Keys of dicts have to be text or numbers, because hashing a tuple that is nested a million
times crashes the process.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import read_bytes
from llavamed_jax.utils.private import PythonUnpickler

_PLAIN = """
PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET
NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS
""".split()


class _Refused(Exception):
    """The pickle contains an instruction, or a use of one, that plain data does not need."""


class _Instructions(dict):
    """Maps the byte of an instruction to the function that runs it."""

    def __missing__(self, code: int):
        known = pickletools.code2op.get(chr(code))
        raise _Refused(f"the instruction {known.name}" if known
                       else f"the byte {code}, which is not a pickle instruction")


class _PlainUnpickler(PythonUnpickler):
    dispatch = _Instructions({getattr(pickle, name)[0]: PythonUnpickler.dispatch[getattr(pickle, name)[0]]
                              for name in _PLAIN})

    def _load_dict(self):
        items = self.pop_mark()
        self.append(self._filled({}, items))

    def _load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._filled(self.stack[-1], [key, value])

    def _load_setitems(self):
        items = self.pop_mark()
        self._filled(self.stack[-1], items)

    @staticmethod
    def _filled(target: Any, items: list) -> dict:
        if type(target) is not dict or len(items) % 2:
            raise _Refused("an instruction that sets an item of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, type(None))):
                raise _Refused(f"a {type(key).__name__} as the key of a dict")
            target[key] = value
        return target

    dispatch |= {pickle.DICT[0]: _load_dict, pickle.SETITEM[0]: _load_setitem, pickle.SETITEMS[0]: _load_setitems}


def read_plain_pickle(file: Path) -> Any:
    """Reads a pickle of lists, dicts, tuples, text and numbers; text of Python 2 is decoded as UTF-8.

    Raises:
      UserError: the file is missing, damaged, truncated, not a pickle, or contains anything else.
    """
    try:
        data = read_bytes(file, f"the data file {file}")
    except FileNotFoundError:
        raise UserError(f"the data file {file} does not exist") from None
    wanted = "a pickle of lists, dicts, text and numbers only was expected"
    try:
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except UserError:
        raise
    except _Refused as refused:
        raise UserError(f"{file} holds {refused}; {wanted}") from None
    except EOFError:
        raise UserError(f"{file} is empty or ends too early; {wanted}") from None
    except Exception as error:  # a damaged pickle may raise any exception, even with plain instructions only
        raise UserError(f"{file} is not a pickle or is damaged ({type(error).__name__}); {wanted}") from None
