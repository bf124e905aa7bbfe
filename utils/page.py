"""Pages of HTML that need no other file: a template of this folder, with the pictures inside."""

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from utils.files import replacing


def write_page(path: Path, template: str, **values: object) -> None:
    """Fill a template, which extends page.html; everything in `values` is escaped."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    write_text(path, pages.get_template(template).render(**values))


def write_text(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode(errors="backslashreplace"))  # a name of a file may be no Unicode


def data_uri(content: bytes, kind: str) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
