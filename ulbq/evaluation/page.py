"""Pages: self-contained HTML, light or dark, without the network.

The templates in ``pages/`` share one skeleton. They escape whatever is no markup yet: pages show strings of files that
strangers made. The only markup from outside a template is a drawing of :mod:`ulbq.evaluation.svg`, which escapes too.
"""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ulbq import __version__
from ulbq.printable import printable

_TEMPLATES = Environment(
    loader=PackageLoader("ulbq.evaluation", "pages"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters["printable"] = printable


def render(name: str, **values: Any) -> str:
    """A page, as HTML.

    Args:
        name: of its template in ``pages/``.
        values: what the template shows; every page wants ``title``, ``told`` (a line below it) and ``created``.
    """
    return _TEMPLATES.get_template(f"{name}.html.j2").render(version=__version__, **values)
