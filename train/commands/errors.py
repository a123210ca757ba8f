"""Which errors are a user's to mend, and how to say them in one line."""

import argparse
import traceback

NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes:",
    "Errors:",
    "Expected a <class 'NoneType'>",
    "Given value type:",
    "Given value:",
    "Problem with given class_path",
    "Parser key",
)
PACKAGES = ("seqzoo", "jsonargparse")


def explain(error: Exception) -> str | None:
    """The error in one line; None when it is no user's mistake and its traceback must be seen.

    A user's mistake is a refusal by seqzoo or by the parser, a file that cannot be had, or a
    configuration that Lightning refuses. A ValueError from within torch, say, is a bug.
    """
    if isinstance(error, OSError):
        return f"{error.strerror}: {error.filename}" if error.strerror else flat(str(error))
    if isinstance(error, argparse.ArgumentError):
        return condense(str(error))
    if type(error).__name__ == "MisconfigurationException":
        return flat(str(error))
    ours = isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("seqzoo")
    refusal = isinstance(error, ValueError | ImportError) and not ours
    refusal = refusal and _raised_in(error) in PACKAGES
    return condense(str(error)) if refusal else None


def condense(text: str) -> str:
    """The telling lines of a message of the parser, which reports every type that did not fit."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    telling = [line for line in lines if line and not line.startswith(NOISE)]
    return flat("; ".join(dict.fromkeys(telling)) or text)


def flat(text: str) -> str:
    """On one line."""
    return " ".join(text.split())


def _raised_in(error: Exception) -> str:
    """Top-level package of the code that raised."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return str(frames[-1].f_globals.get("__name__", "")).partition(".")[0] if frames else ""
