"""The walk step by step: an animated GIF, and an HTML page with a slider that opens without a network."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from PIL import Image

from adafactor.cli._surfaces import Surface
from adafactor.cli._trace_draw import ADAFACTOR, ADAM, num, png
from adafactor.cli._trace_stage import DOTS_UP_TO, Stage, Track, table_texts
from adafactor.cli._trace_walk import Row, Walk

FRAMES = 120  # at most, the start included
SECONDS = 8.0  # of a GIF, before the last frame is held
HOLD = 2500  # ms
HTML_DPI = 150
POSITIONS = 2000  # of the page's slider, at most, besides the start


def frame_steps(steps: int, most: int) -> list[int]:
    """How many steps are drawn in each frame: all of 0..steps, or ``most`` of them evenly spread."""
    return np.linspace(0, steps, min(steps + 1, most)).round().astype(int).tolist()


def frame_count(steps: int) -> int:
    """How many frames a GIF of so many steps has."""
    return len(frame_steps(steps, FRAMES))


def gif(surface: Surface, ours: Walk, adam: Walk, note: str, progress: Callable[[], None]) -> bytes:
    """The picture as an animated GIF; ``progress()`` is called after each frame."""
    stage = Stage(surface, ours, adam, note, strip=0.85, dpi=80)
    lines = stage.lines(animated=True)
    cells = stage.table([("1", ADAFACTOR, ours.rows[0]), ("1", ADAM, adam.rows[0])], animated=True)
    heads = [
        (track, Line2D([], [], marker="o", ms=8, mew=1.4, mec="white", color=track.colour, zorder=10, animated=True))
        for track in stage.tracks
        if track.path
    ]
    for track, head in heads:
        track.axes.add_line(head)
    stage.canvas.draw()
    background = stage.canvas.copy_from_bbox(stage.fig.bbox)

    def frame(done: int) -> np.ndarray:
        stage.canvas.restore_region(background)
        for track, line in lines:
            k = max(0, done + 1 - track.first)
            line.set_data(track.x[:k], track.y[:k])
            track.axes.draw_artist(line)
        for track, head in heads:
            head.set_data(track.x[done : done + 1], track.y[done : done + 1])
            track.axes.draw_artist(head)
        for texts, walk in zip(cells, (ours, adam), strict=True):
            row = walk.rows[max(done, 1) - 1]
            for text, value in zip(texts, table_texts(str(row.t), row), strict=True):
                text.set_text(value)
                stage.fig.draw_artist(text)
        return np.asarray(stage.canvas.buffer_rgba())[..., :3].copy()

    chosen = frame_steps(len(ours.rows), FRAMES)
    palette = _Palette(frame(chosen[-1]))  # the last frame has every colour
    frames = []
    for done in chosen:
        frames.append(palette.image(frame(done)))
        progress()
    each = int(min(200, max(40, 1000 * SECONDS / len(frames)))) // 10 * 10
    durations = [each] * (len(frames) - 1) + [HOLD]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


class _Palette:
    """The same 255 colours for all frames, so that nothing flickers; each pixel gets the nearest, white stays white.

    Pillow's own conversion to a given palette searches coarsely and turns white paper grey.
    """

    def __init__(self, typical: np.ndarray) -> None:
        colours = Image.fromarray(typical).quantize(254, dither=Image.Dither.NONE).getpalette() or []
        self.colours = np.array([[255, 255, 255], *np.reshape(colours, (-1, 3))], dtype=np.uint8)
        self.index = np.full(1 << 24, -1, dtype=np.int16)  # by 24-bit colour, filled as colours turn up

    def image(self, pixels: np.ndarray) -> Image.Image:
        """[height, width, 3] as an image of palette indices."""
        codes = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
        new = np.unique(codes[self.index[codes] < 0])
        rgb = np.stack([new >> 16, new >> 8 & 255, new & 255], -1)
        for k in range(0, len(new), 4096):
            far = np.square(rgb[k : k + 4096, None] - self.colours[None].astype(np.int32)).sum(-1)
            self.index[new[k : k + 4096]] = far.argmin(1)
        image = Image.fromarray(self.index[codes].astype(np.uint8))
        image.putpalette(self.colours.tobytes())
        return image


def page(surface: Surface, ours: Walk, adam: Walk, note: str) -> str:
    """A self-contained page: the empty picture, the curves as SVG over it, the numbers of one step, a slider."""
    stage = Stage(surface, ours, adam, note, dpi=HTML_DPI)
    stage.canvas.draw()
    width, height = (round(v) for v in stage.fig.bbox.size)
    at = frame_steps(len(ours.rows), POSITIONS + 1)
    data = {
        "at": at,
        "tracks": [_pixels(track, height, at) for track in stage.tracks],
        "walks": [_numbers(ours, at), _numbers(adam, at)],
    }
    picture = base64.b64encode(png(stage.fig)).decode()
    values = {
        "TITLE": html.escape(f"How Adafactor walks: {surface.title}"),
        "WIDTH": str(width),
        "HEIGHT": str(height),
        "PICTURE": picture,
        "STEPS": str(len(at) - 1),
        "ADAFACTOR": ADAFACTOR,
        "ADAM": ADAM,
        "DATA": json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("</", "<\\/"),
    }
    text = PAGE
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", value)
    return text


def _pixels(track: Track, height: int, at: list[int]) -> dict[str, Any]:
    """A track in the picture's pixels, y downwards, one point per position of the slider (from ``first`` on)."""
    points = track.axes.transData.transform(np.column_stack([track.x, track.y]))
    points = points[[k - track.first for k in at[track.first :]]]
    points[:, 1] = height - points[:, 1]
    scale = HTML_DPI / 72
    return {
        "points": points.round(1).tolist(),
        "first": track.first,
        "colour": track.colour,
        "width": round(track.width * scale, 2),
        "path": track.path,
        "dots": round(1.8 * scale, 2) if track.path and len(track.x) <= DOTS_UP_TO else 0,
        "dashed": track.dashed,
    }


def _numbers(walk: Walk, at: list[int]) -> dict[str, Any]:
    def texts(row: Row) -> list[Any]:
        lists = [row.p, row.g, row.M, row.R, row.C, row.V, row.U, row.step]
        return [num(row.f), num(row.clip), *([num(v) for v in values] for values in lists)]

    return {"name": walk.name, "settings": walk.describe(), "rows": [texts(walk.rows[k - 1]) for k in at[1:]]}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>{{TITLE}}</title>
<style>
 body { margin: 0 auto; max-width: 1150px; padding: 12px 16px 40px; font: 15px/1.45 system-ui, sans-serif;
        color: #1c1c22; background: #fff }
 .stage { position: relative } .stage img, .stage svg { display: block; width: 100% }
 .stage svg { position: absolute; inset: 0; height: 100% }
 .bar { position: sticky; bottom: 0; display: flex; gap: 12px; align-items: center; padding: 10px 0;
        background: #fffffff2; border-top: 1px solid #e6e6ea; border-bottom: 1px solid #e6e6ea; z-index: 1 }
 .bar input { flex: 1 } .bar output { min-width: 9em; text-align: right; font-variant-numeric: tabular-nums }
 button { font: inherit; width: 5.2em; padding: 4px 0; border: 1px solid #b9bac2; border-radius: 6px;
          background: #f6f6f8; cursor: pointer }
 table { border-collapse: collapse; width: 100%; margin-top: 14px; font-variant-numeric: tabular-nums }
 th, td { padding: 3px 8px; text-align: right; border-bottom: 1px solid #eeeef1; white-space: nowrap }
 th:first-child { text-align: left } th { font-weight: 600 }
 td { font-family: ui-monospace, monospace; font-size: 14px }
 caption { text-align: left; font-weight: 700; padding: 4px 8px }
 .two { display: grid; grid-template-columns: repeat(auto-fit, minmax(340px, 1fr)); gap: 0 36px; align-items: start }
 td.all { text-align: center } p { max-width: 72ch; color: #5f6068 }
</style></head><body>
<div class="stage"><img alt="{{TITLE}}: contours, f after each step, and the root of V" width="{{WIDTH}}"
 height="{{HEIGHT}}" style="height:auto" src="data:image/png;base64,{{PICTURE}}">
<svg viewBox="0 0 {{WIDTH}} {{HEIGHT}}" aria-hidden="true"></svg></div>
<div class="bar"><button type="button">Play</button>
<input type="range" min="0" max="{{STEPS}}" step="1" value="{{STEPS}}" aria-label="steps drawn"><output></output></div>
<div class="two"><table style="--c:{{ADAFACTOR}}"></table><table style="--c:{{ADAM}}"></table></div>
<p>The numbers are those of the step just taken: the point before it, the gradient there, the optimizer's own state
after it, and how far the point moved. A table cell that spans both columns is one number for x and y together.
The arrow keys move the slider.</p>
<script type="application/json">{{DATA}}</script>
<script>
"use strict";
const data = JSON.parse(document.querySelector("script[type='application/json']").textContent);
const svg = document.querySelector("svg"), slider = document.querySelector("input"),
      button = document.querySelector("button"), output = document.querySelector("output"),
      tables = document.querySelectorAll("table");
const add = (name, attributes) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return svg.appendChild(node);
};
const drawn = data.tracks.map(t => {
  const style = { fill: "none", "stroke-linejoin": "round", "stroke-linecap": t.dashed ? "butt" : "round" };
  const lines = [];
  if (t.path) lines.push(add("polyline", { ...style, stroke: "white", "stroke-width": t.width + 3.8 }));
  lines.push(add("polyline", { ...style, stroke: t.colour, "stroke-width": t.width,
    "stroke-dasharray": t.dashed ? "10 5" : "none" }));
  const dots = t.dots ? t.points.map(p => add("circle", { cx: p[0], cy: p[1], r: t.dots, fill: t.colour })) : [];
  const head = add("circle", { r: t.path ? 8 : 5, fill: t.colour, stroke: "white", "stroke-width": 2.5 });
  return { t, lines, dots, head };
});
const last = data.at.length - 1;
const names = ["point p", "gradient g", "momentum M", "R, row means", "C, column means",
               "V", "U", "step taken"];
const meaning = [["V = RC / mean(R)", "U = g / √V"], ["V, bias-corrected", "U = M / √V"]];
function show(k) {
  slider.value = k;
  output.textContent = k === 0 ? "start" : `step ${data.at[k]} of ${data.at[last]}`;
  for (const { t, lines, dots, head } of drawn) {
    const n = Math.max(0, k + 1 - t.first), text = t.points.slice(0, n).map(p => p.join(",")).join(" ");
    for (const line of lines) line.setAttribute("points", text);
    dots.forEach((dot, i) => { dot.style.display = i < n ? "" : "none"; });
    head.style.display = n ? "" : "none";
    if (n) { head.setAttribute("cx", t.points[n - 1][0]); head.setAttribute("cy", t.points[n - 1][1]); }
  }
  data.walks.forEach((walk, w) => {
    const [f, clip, ...lists] = walk.rows[Math.max(k, 1) - 1], table = tables[w];
    table.replaceChildren();
    const caption = table.createCaption();
    caption.textContent = `${walk.name}, ${walk.settings}, step ${data.at[Math.max(k, 1)]}`;
    caption.style.color = "var(--c)";
    const line = (name, cells, tag = "td") => {
      const row = table.insertRow(), head = document.createElement("th");
      head.textContent = name; row.append(head);
      for (const value of cells) {
        const cell = document.createElement(tag);
        cell.textContent = value;
        if (cells.length === 1) { cell.colSpan = 2; cell.className = "all"; }
        row.append(cell);
      }
    };
    line("", ["x", "y"], "th");
    line("f before the step", [f]);
    lists.forEach((cells, i) => {
      if (cells.length) line(i === 5 ? meaning[w][0] : i === 6 ? meaning[w][1] : names[i], cells);
      if (i === 6 && w === 0) line("clipping divides U by", [clip]);
    });
  });
}
let timer = null;
const stop = () => { clearInterval(timer); timer = null; button.textContent = "Play"; };
button.onclick = () => {
  if (timer) return stop();
  const stride = Math.max(1, Math.round(last / 150));
  let k = +slider.value >= last ? 0 : +slider.value;
  button.textContent = "Pause";
  show(k);
  timer = setInterval(() => { k = Math.min(k + stride, last); show(k); if (k >= last) stop(); }, 70);
};
slider.oninput = () => { if (timer) stop(); show(+slider.value); };
show(last);
</script></body></html>
"""
