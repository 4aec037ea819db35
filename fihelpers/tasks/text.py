"""Plain text: one context a line, to be continued."""

from pathlib import Path

from fihelpers.tasks.base import Example

SUBJECT = "text"


def read_text(path: Path) -> list[Example]:
    """Read a UTF-8 file with one context a line; blank lines are passed over.

    Only line ends (LF, CR LF, CR) part contexts, not the other breaks of Unicode, such as U+2028.
    The model's own next token stands in for the answer, so the examples have none.
    Raises ValueError if the file is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # reading turns every line end into LF
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error.reason}); save it as UTF-8.") from error
    return [
        Example(f"{SUBJECT}/{number}", SUBJECT, line, (), None, line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
