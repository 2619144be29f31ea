"""The command line: ``adafactor compare``, ``bench``, ``plan``, ``train`` and ``trace``."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import Any

from adafactor.cli._errors import CheckFailed, Interrupted, UserError

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory")  # torch raises RuntimeError
_NEEDED = ("typer", "rich", "numpy", "matplotlib", "jinja2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the exit code.

    0 is success, 1 a check of ours that failed, 2 a mistake of the user's (one line on stderr says which and how to
    mend it), 128 + n the signal n.

    Args:
        arguments: what follows ``adafactor``; None for the process's own.
    """
    missing = _missing()
    if missing:
        return _fail(f"the command line needs {', '.join(missing)}: pip install 'adafactor[cli]'")
    import typer

    from adafactor.cli import _ranks

    try:
        code = build()(args=arguments, standalone_mode=False, prog_name="adafactor")
        _ranks.leave()
    except UserError as error:
        return _fail(str(error))
    except CheckFailed as error:
        return _fail(str(error), 1)
    except Interrupted as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", 130)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # the parser's: click's class, or that of typer's copy of it
        if usage is not None:
            return _fail(usage())
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return _fail("out of memory: a smaller --width, --depth, --context or --batch-size, or --scale, needs less")
        if _ranks.lost_another(error):
            return _fail("another process is gone; `train --resume` continues from the last checkpoint", 1)
        if not _ranks.first_to_fail():
            return 1
        raise
    return code if isinstance(code, int) else 0


def build() -> Any:
    """The typer application, a command from each file."""
    import typer

    from adafactor import __version__
    from adafactor.cli.bench import bench
    from adafactor.cli.compare import compare
    from adafactor.cli.plan import plan
    from adafactor.cli.trace import trace
    from adafactor.cli.train import train

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        help="Adafactor for PyTorch: is it as good as AdamW here, and how much memory does it save?",
    )

    def version(wanted: bool) -> None:
        if wanted:
            typer.echo(f"adafactor {__version__}")
            raise typer.Exit

    @app.callback()
    def options(
        _version: bool = typer.Option(False, "--version", callback=version, is_eager=True, help="Print the version."),
    ) -> None:
        pass

    for command in (compare, bench, plan, train, trace):
        app.command()(command)
    return app


def _missing() -> list[str]:
    from importlib.util import find_spec

    return [name for name in _NEEDED if find_spec(name) is None]


def _fail(message: str, code: int = 2) -> int:
    from adafactor.cli import _ranks

    if message and _ranks.first_to_fail():  # empty where the help was printed in place of a missing command
        print("adafactor:", " ".join(message.split()), file=sys.stderr)
    return code
