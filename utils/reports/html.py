"""Pages of HTML that need no other file: a template of templates/, with the pictures inside."""

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from utils.system.files import write_text


def write_page(path: Path, template: str, **values: object) -> None:
    """Fill a template, which extends page.html; everything in `values` is escaped."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    write_text(path, pages.get_template(template).render(**values))


def data_uri(content: bytes, kind: str) -> str:
    """A picture as an address that holds it."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
