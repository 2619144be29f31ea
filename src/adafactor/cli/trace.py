"""`adafactor trace`: how Adafactor walks, beside Adam, and what its factoring keeps of a matrix."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adafactor.cli._errors import UserError
from adafactor.cli._surfaces import SURFACES, Surface

if TYPE_CHECKING:
    from rich.console import Console

    from adafactor.cli._trace_matrix import Factoring
    from adafactor.cli._trace_walk import Walk

ANIMATIONS = ("gif", "html")
MOST_STEPS = 100_000
PAPER_STEPS = 600  # the relative step moves by one percent of the point's size at a time
MATRIX_STEPS, MATRIX_LR = 40, 0.1
TABLE_ROWS = 10


def trace(
    surface: Annotated[str, typer.Option(help=f"Where to walk: {', '.join(SURFACES)}.")] = "bowl",
    start: Annotated[tuple[float, float], typer.Option(help="The first point.", metavar="X Y")] = (4.0, 4.0),
    steps: Annotated[
        int | None,
        typer.Option(
            help=f"How many steps (default: the surface's own, {SURFACES['bowl'].steps} on the bowl; "
            f"at least {PAPER_STEPS} with --relative-step; {MATRIX_STEPS} with --matrix).",
            show_default=False,
        ),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="The learning rate, the same for both "
            f"(default: the surface's own, {SURFACES['bowl'].lr:g} on the bowl; {MATRIX_LR:g} with --matrix).",
            show_default=False,
        ),
    ] = None,
    relative_step: Annotated[
        bool,
        typer.Option("--relative-step", help="Adafactor as in the paper: no lr, steps relative to the point's size."),
    ] = False,
    beta1: Annotated[float | None, typer.Option(help="Adafactor's momentum; Adam always has 0.9.")] = None,
    layout: Annotated[str, typer.Option(help="The point as a matrix: 1x2 (a row) or 2x1 (a column).")] = "1x2",
    animate: Annotated[str | None, typer.Option(help="Also write trace.gif, or trace.html with a slider.")] = None,
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Instead of a walk: g squared, R, C and V of a 32 x 32 weight as heat maps."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(help="Text for --matrix (default: the source of Python's standard library).", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Which batches --matrix draws; a walk has nothing random.")] = 0,
    out: Annotated[Path, typer.Option(help="Where the pictures and tables go; files there are replaced.")] = Path(
        "runs/trace"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, and nothing else.")] = False,
) -> None:
    """Show how Adafactor walks, beside Adam, with R, C, V, U and the step in a table.

    Both start at the same point with the same learning rate. The point is
    held as a matrix of one row (or one column), because R and C exist for
    matrices only. Such a matrix always has rank 1, so in two dimensions the
    factoring loses nothing; --matrix shows what it keeps and loses of a real one.

    What to look for: Adam's momentum carries it past the minimum. Adafactor,
    which has none unless --beta1 is given, brakes, because V still remembers
    the larger gradients of the start. Once V has forgotten them, a constant lr
    makes it bounce in steep valleys (--surface rosenbrock): --beta1 0.9 mends it.
    """
    from rich.console import Console

    _validate(surface, start, steps, lr, beta1, layout, animate, matrix, seed)
    _prepare(out)
    stdout, stderr = Console(), Console(stderr=True)
    if matrix:
        given = None if relative_step else (MATRIX_LR if lr is None else lr)
        payload, found = _matrix(data, steps or MATRIX_STEPS, given, seed, out, stderr)
        if not as_json:
            _print_matrix(stdout, found, payload["files"])
    else:
        where = SURFACES[surface]
        count = steps or (max(PAPER_STEPS, where.steps) if relative_step else where.steps)
        rate = where.lr if lr is None else lr
        payload, walks = _walks(where, start, count, rate, relative_step, beta1, layout, animate, out, stderr)
        if not as_json:
            _print_walks(stdout, walks, payload)
    if as_json:
        typer.echo(json.dumps(payload, indent=2, allow_nan=False))


def _validate(
    surface: str,
    start: tuple[float, float],
    steps: int | None,
    lr: float | None,
    beta1: float | None,
    layout: str,
    animate: str | None,
    matrix: bool,
    seed: int,
) -> None:
    for name, value, allowed in (
        ("--surface", surface, tuple(SURFACES)),
        ("--layout", layout, ("1x2", "2x1")),
        ("--animate", animate, (None, *ANIMATIONS)),
    ):
        if value not in allowed:
            raise UserError(f"{name} must be one of {', '.join(a for a in allowed if a)}, not {value!r}; choose one")
    if not all(map(math.isfinite, start)):
        raise UserError(f"--start must be two finite numbers, not {start[0]} {start[1]}; for example --start 4 4")
    if steps is not None and not 1 <= steps <= MOST_STEPS:
        raise UserError(f"--steps must be between 1 and {MOST_STEPS}, not {steps}; leave it out for the default")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise UserError(f"--lr must be a finite number above 0, not {lr}; leave it out for the default")
    if beta1 is not None and not 0 <= beta1 < 1:
        raise UserError(f"--beta1 must be at least 0 and below 1, not {beta1}; 0.9 is usual")
    if not 0 <= seed < 1 << 63:
        raise UserError(f"--seed must be between 0 and 2**63 - 1, not {seed}; 0 is the default")
    if matrix and animate:
        raise UserError(f"--animate must be left out with --matrix, not {animate!r}: heat maps are one picture")


def _prepare(out: Path) -> None:
    """Make the directory now, so that a mistake shows before the work and not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(out, os.W_OK | os.X_OK) else "permission denied"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"--out must be a directory that can be written, not {out} ({reason}); name another")


@contextmanager
def _progress(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """A bar on the terminal; yields what to call after each part. Nothing where no one looks."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


# --- the walk ---


def _walks(
    surface: Surface,
    start: tuple[float, float],
    steps: int,
    lr: float,
    relative_step: bool,
    beta1: float | None,
    layout: str,
    animate: str | None,
    out: Path,
    console: Console,
) -> tuple[dict[str, Any], tuple[Walk, Walk]]:
    from adafactor.cli import _trace_animate as animation
    from adafactor.cli._files import write_atomic
    from adafactor.cli._trace_draw import png
    from adafactor.cli._trace_stage import still
    from adafactor.cli._trace_walk import walk_both

    with _progress(console, "walking", 2 * steps) as advance:
        walks = walk_both(surface, start, layout, steps, lr, relative_step, beta1, advance)
    note = _note(layout)
    files = {"picture": out / "trace.png", "table": out / "trace.csv"}
    write_atomic(files["picture"], png(still(surface, *walks, note)))
    write_atomic(files["table"], _csv(walks))
    if animate:
        files["animation"] = out / f"trace.{animate}"
        if animate == "html":
            write_atomic(files["animation"], animation.page(surface, *walks, note))
        else:
            with _progress(console, "drawing", animation.frame_count(steps)) as advance:
                write_atomic(files["animation"], animation.gif(surface, *walks, note, advance))
    payload: dict[str, Any] = {
        "command": "trace",
        "surface": surface.name,
        "formula": surface.formula,
        "minima": [list(m) for m in surface.minima],
        "start": list(start),
        "layout": layout,
        "note": note,
    }
    for walk in walks:
        payload[walk.name.lower()] = {
            "settings": walk.settings,
            "end": walk.end,
            "f_end": walk.f_end,
            "distance_to_nearest_minimum": min(math.dist(walk.end, m) for m in surface.minima),
            "rows": [row.as_dict() for row in walk.rows],
        }
    payload["files"] = {name: str(path) for name, path in files.items()}
    return payload, walks


def _note(layout: str) -> str:
    if layout == "1x2":
        shape, counts, line, equal = "1×2", "R (1 number) and C (2 numbers)", "row", "C"
    else:
        shape, counts, line, equal = "2×1", "R (2 numbers) and C (1 number)", "column", "R"
    return (
        f"The point is held as a {shape} matrix, so that {counts} exist. One {line} always has rank 1: "
        f"V = {equal}, and the factoring loses nothing here."
    )


def _csv(walks: tuple[Walk, Walk]) -> str:
    """Every number of every step, in full precision; empty where an optimizer has none."""
    sizes = {"p": 2, "g": 2, "R": 2, "C": 2, "M": 2, "V": 2, "U": 2, "step": 2}
    names = {k: [f"{k}_{i}" for i in ((1, 2) if k in "RC" else "xy")] for k in sizes}
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["optimizer", "t", "f", *(n for k in sizes for n in names[k]), "clip"])
    for walk in walks:
        for row in walk.rows:
            values = row.as_dict()
            cells = [v for k, n in sizes.items() for v in [*values[k], *[""] * (n - len(values[k]))]]
            writer.writerow([walk.name, row.t, row.f, *cells, row.clip])
    return buffer.getvalue()


def _print_walks(console: Console, walks: tuple[Walk, Walk], payload: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from adafactor.cli._trace_draw import chosen_steps, num

    ours = walks[0]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    table.title = f"Adafactor on {payload['surface']}: upper line x, lower line y"
    for name in ("t", "f", "p", "g", "R", "C", "V=RC/mean(R)", "U=g/√V", "step"):
        table.add_column(name, justify="right", no_wrap=True, vertical="middle")
    for t in chosen_steps(len(ours.rows), TABLE_ROWS):
        row = ours.rows[t - 1]
        lists = (row.p, row.g, row.R, row.C, row.V, row.U, row.step)
        table.add_row(str(t), num(row.f), *("\n".join(map(num, v)) for v in lists))
    console.print(table)
    console.print(payload["note"], highlight=False, markup=False)
    clipped = sum(row.clip > 1 for row in ours.rows)
    if clipped:
        console.print(
            f"In {clipped} of {len(ours.rows)} steps RMS(U) was above 1, and U was divided by it.", highlight=False
        )
    for walk in walks:
        n = len(walk.rows)
        end = " ".join(map(num, walk.end))
        far = num(payload[walk.name.lower()]["distance_to_nearest_minimum"])
        said = f"{walk.name} ({walk.describe()}): f = {num(walk.f_end)} after {n} step{'s' * (n > 1)}, at ({end})"
        console.print(f"{said}, {far} from the nearest minimum", highlight=False, markup=False)
    _print_files(console, payload["files"])


def _print_files(console: Console, files: dict[str, str]) -> None:
    for path in files.values():
        console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)


# --- the matrix ---


def _matrix(
    data: Path | None, steps: int, lr: float | None, seed: int, out: Path, console: Console
) -> tuple[dict[str, Any], Factoring]:
    from adafactor.cli._files import write_atomic
    from adafactor.cli._trace_draw import png
    from adafactor.cli._trace_heat import heat_maps
    from adafactor.cli._trace_matrix import factoring

    with _progress(console, "training", steps) as advance:
        found = factoring(data, steps, lr, seed, advance)
    files = {"picture": out / "matrix.png", "table": out / "matrix.csv"}
    write_atomic(files["picture"], png(heat_maps(found)))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["before", "next", "g2", "ema", "R", "C", "V", "V_over_ema"])
    for i, before in enumerate(found.labels):
        for j, after in enumerate(found.labels):
            values = (found.g2[i, j], found.ema[i, j], found.R[i], found.C[j], found.V[i, j], found.ratio[i, j])
            writer.writerow([before, after, *map(float, values)])
    write_atomic(files["table"], buffer.getvalue())
    settings = {"lr": lr, "steps": steps, "seed": seed}
    payload = {"command": "trace --matrix", "settings": settings, **found.as_dict()}
    payload["files"] = {name: str(path) for name, path in files.items()}
    return payload, found


def _print_matrix(console: Console, found: Factoring, files: dict[str, str]) -> None:
    from adafactor.cli._trace_heat import caption

    n = len(found.labels)
    console.print(
        f"The weight of a bigram model, {n} x {n}, after {found.steps} step{'s' * (found.steps > 1)} on {found.source}",
        highlight=False,
        markup=False,
    )
    for head, line in caption(found):
        console.print(f"{head:<5}{line}", highlight=False, markup=False)
    _print_files(console, files)
