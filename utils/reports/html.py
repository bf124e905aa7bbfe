"""Self-contained HTML pages, from the templates in templates/."""

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from utils.system.files import write_text


def write_page(path: Path, template: str, **values: object) -> None:
    """Render a template to `path`, with all `values` escaped."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True)
    write_text(path, pages.get_template(template).render(**values))


def data_uri(content: bytes, kind: str) -> str:
    """The data URI of an image file; `kind` is its MIME subtype, such as "png"."""
    return f"data:image/{kind};base64,{b64encode(content).decode()}"
