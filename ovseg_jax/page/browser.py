"""Styles, scripts and headers of the page, beside Gradio's own: layout, pointing, saving, security."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""No request may go anywhere but to this server."""

CSS = """
.ov-row { display: flex; flex-wrap: wrap; gap: 12px; align-items: flex-start; }
.ov-row > figure { flex: 1 1 260px; min-width: 0; margin: 0; }
.ov-row figcaption { font-weight: 600; margin: 2px 0 4px; overflow-wrap: anywhere; }
.ov-frame { position: relative; cursor: crosshair; touch-action: manipulation; line-height: 0; }
.ov-frame:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
.ov-row img { width: 100%; height: auto; display: block; border-radius: 4px; margin: 0; user-select: none; }
.ov-tip { position: absolute; display: none; pointer-events: none; padding: 3px 8px; border-radius: 4px; z-index: 2;
  background: #212529; color: #fff; font-size: 14px; line-height: 1.4; white-space: nowrap; max-width: 95%;
  overflow: hidden; text-overflow: ellipsis; }
.ov-cross { position: absolute; display: none; width: 17px; height: 17px; margin: -8px 0 0 -8px; z-index: 1;
  border: 2px solid #fff; border-radius: 50%; box-shadow: 0 0 0 2px #212529; pointer-events: none; }
.ov-row table.ov-legend { width: 100%; border-collapse: collapse; margin: 6px 0 0; font-size: 14px; border: 0; }
.ov-row .ov-legend tr { border: 0; border-bottom: 1px solid var(--border-color-primary); }
.ov-row .ov-legend th, .ov-row .ov-legend td { text-align: right; padding: 2px 6px; border: 0; font-weight: 400; }
.ov-row .ov-legend th { opacity: 0.7; }
.ov-row .ov-legend :is(th, td):first-child { text-align: left; overflow-wrap: anywhere; }
#ov-examples { height: auto !important; min-height: 0 !important; }
#ov-examples .grid-wrap { overflow: hidden auto; min-height: 0; max-height: 260px; }
#ov-examples .thumbnail-item { aspect-ratio: 1; }
#ov-examples .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)); padding-top: 26px; }
#ov-word { align-items: end; }
:root { --block-info-text-color: #52525b; --input-placeholder-color: #71717a; }
.dark { --block-info-text-color: #d4d4d8; --input-placeholder-color: #a1a1aa; }
.ov-legend i { display: inline-block; width: 14px; height: 14px; margin-right: 8px; border-radius: 3px;
  vertical-align: -2px; border: 1px solid #8888; }
.ov-good, .ov-bad { margin: 0; min-height: 1.5em; overflow-wrap: anywhere; }
.ov-bad { border-left: 4px solid #d55e00; padding-left: 8px; font-weight: 600; }
"""

ON_LOAD = """
const maps = new WeakMap();
const pixels = (frame) => {
  if (!maps.has(frame)) {
    const image = new Image();
    maps.set(frame, null);
    image.onload = () => {
      const canvas = document.createElement("canvas");
      [canvas.width, canvas.height] = [image.width, image.height];
      const context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(image, 0, 0);
      maps.set(frame, context.getImageData(0, 0, image.width, image.height));
      if (frame.dataset.x && frame.matches(":hover, :focus")) tell(frame, +frame.dataset.x, +frame.dataset.y, false);
    };
    if (frame.dataset.map) image.src = frame.dataset.map;
  }
  return maps.get(frame);
};
const tell = (frame, x, y, cross) => {
  [frame.dataset.x, frame.dataset.y] = [x, y];
  const tip = frame.querySelector(".ov-tip"), mark = frame.querySelector(".ov-cross"), data = pixels(frame);
  if (cross) [mark.style.display, mark.style.left, mark.style.top] = ["block", `${100 * x}%`, `${100 * y}%`];
  if (!data) return;
  const column = Math.min(data.width - 1, Math.floor(x * data.width));
  const row = Math.min(data.height - 1, Math.floor(y * data.height));
  const [high, low, score] = data.data.slice(4 * (row * data.width + column));
  const number = 256 * high + low;
  tip.textContent = number ? `${JSON.parse(frame.dataset.words)[number - 1]} ${(score / 255).toFixed(2)}` : "unknown";
  tip.style.display = "block";
  [tip.style.left, tip.style.right] = x < 0.5 ? [`calc(${100 * x}% + 12px)`, "auto"]
    : ["auto", `calc(${100 * (1 - x)}% + 12px)`];
  [tip.style.top, tip.style.bottom] = y < 0.8 ? [`calc(${100 * y}% + 12px)`, "auto"]
    : ["auto", `calc(${100 * (1 - y)}% + 12px)`];
};
const place = (event) => {
  const frame = event.target.closest(".ov-frame");
  if (!frame) return null;
  const box = frame.getBoundingClientRect(), inside = (v) => Math.min(0.9999, Math.max(0, v));
  return [frame, inside((event.clientX - box.left) / box.width), inside((event.clientY - box.top) / box.height)];
};
const ask = (frame) => trigger("select", { x: Number(frame.dataset.x), y: Number(frame.dataset.y) });
element.addEventListener("pointerover", (event) => { const at = place(event); if (at) pixels(at[0]); });
element.addEventListener("pointermove", (event) => { const at = place(event); if (at) tell(...at, false); });
element.addEventListener("click", (event) => { const at = place(event); if (at) { tell(...at, true); ask(at[0]); } });
element.addEventListener("pointerout", (event) => {
  const frame = event.target.closest(".ov-frame");
  if (frame && !frame.contains(event.relatedTarget)) frame.querySelector(".ov-tip").style.display = "none";
});
element.addEventListener("focusin", (event) => { const f = event.target.closest(".ov-frame"); if (f) pixels(f); });
element.addEventListener("keydown", (event) => {
  const frame = event.target.closest(".ov-frame"), step = event.shiftKey ? 0.1 : 0.02;
  if (!frame) return;
  const by = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  const at = [Number(frame.dataset.x || 0.5), Number(frame.dataset.y || 0.5)];
  if (by) tell(frame, ...at.map((v, i) => Math.min(0.9999, Math.max(0, v + by[i]))), true);
  else if (event.key === "Enter" || event.key === " ") { tell(frame, ...at, true); ask(frame); }
  else return;
  event.preventDefault();
});
"""
"""Pointing at a picture tells its word and score; a click, or Enter behind arrow keys, triggers `select` with x, y."""

SAVE = """
watch("value", () => {
  const file = props.value;
  if (!file || !file.data) return;
  const bytes = Uint8Array.from(atob(file.data), (letter) => letter.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([bytes]));
  link.download = file.name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
});
"""
"""Saves the file {name, data in base64} that the server sends, which is written nowhere else."""
