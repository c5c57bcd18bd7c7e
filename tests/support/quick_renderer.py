"""In place of transformers for the process that renders chat templates, where its life is the subject: it starts in a twentieth of
the time."""

from pathlib import Path

_UTILS = '''
def is_jinja_available():
    return True

def render_jinja_template(talks, chat_template, **_):
    return [[chat_template]]
'''


def write(folder: Path) -> Path:
    """Writes the package; a process that has the folder in its PYTHONPATH imports it."""
    (folder / "transformers" / "utils").mkdir(parents=True)
    for package in ("transformers", "transformers/utils"):
        (folder / package / "__init__.py").touch()
    (folder / "transformers" / "utils" / "chat_template_utils.py").write_text(_UTILS)
    return folder
