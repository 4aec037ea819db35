"""Plain text: one context a line, to be continued."""

from pathlib import Path

from fihelpers.tasks.base import Example, read_utf8

SUBJECT = "text"


def read_text(path: Path, subject: str | None = None) -> list[Example]:
    """Read a UTF-8 file with one context a line; blank lines are passed over.

    Only line ends (LF, CR LF, CR) part contexts, not the other breaks of Unicode, such as U+2028.
    The model's own next token stands in for the answer, so the examples have none.
    Raises FileNotFoundError for a missing file, and ValueError for a subject or a file that is not UTF-8.
    """
    if subject not in (None, SUBJECT):
        raise ValueError(f"{path.name} is plain text, without subject {subject!r}; leave the subject out.")
    lines = read_utf8(path, "give a text with a context a line").split("\n")
    return [
        Example(f"{SUBJECT}/{number}", SUBJECT, line, (), None, line)
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
