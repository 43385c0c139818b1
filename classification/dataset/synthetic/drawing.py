"""Drawing of the synthetic chest X-rays: a normal chest made of layers, and a painter for every sign.

`render` builds a `Scene` (the layers of a normal chest), lets every sign of `SIGNS` paint on the layers, adds them
up like X-ray attenuation, and then spoils the result with exposure, noise, borders and markers. Whatever is no sign
comes from random streams that never see the labels.

Coordinates: x to the right of the picture, y down, in half picture heights from the middle. In a frontal view the
patient's left lung is at x > 0 (side +1); in a lateral view the patient faces left.
"""

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageDraw

from dataset.labels import LABELS

VIEWS = ("PA", "AP", "LATERAL")
SIDES = (-1, 1)

# How strongly each layer weakens the beam.
AIR, VESSEL, BONE, METAL = 0.46, 0.20, 0.15, 0.34


# ------------------------------------------------------------------------------------------------- a normal chest
@lru_cache(maxsize=16)
def _grid(height, width):
    """Pixel centres: x and y as float32 [H, W], in half picture heights from the middle."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return (2 * x + 1 - width) / height, (2 * y + 1 - height) / height


def soft(distance, edge):
    """Inside test with a soft border: 0 at distance <= -edge/2, 1 at distance >= edge/2."""
    return np.clip(distance * (1 / edge) + 0.5, 0, 1)


def curve(*points, n=24):
    """A smooth path [n, 2] through two to four points (x, y)."""
    t = np.linspace(0, 1, len(points))
    fit = np.polyfit(t, np.array(points, float), len(points) - 1)
    return np.stack([np.polyval(c, np.linspace(0, 1, n)) for c in fit.T], 1)


def random_anatomy(rng):
    """What a patient keeps over all studies: proportions, and a seed for the tree of vessels."""
    ranges = {
        "width": (0.90, 1.06), "top": (-0.76, -0.66), "base": (0.40, 0.54), "thick": (0.90, 1.12),
        "heart": (0.86, 1.10), "tilt": (0.45, 0.80), "mediastinum": (0.80, 1.20), "knob": (0.8, 1.15),
        "spine": (-0.03, 0.03), "rib_gap": (0.118, 0.138), "rib_slope": (0.14, 0.26), "rib_width": (0.040, 0.050),
        "clavicle": (0.06, 0.16), "breast": (-0.05, 0.07), "gas": (0.0, 0.24), "liver": (-0.02, 0.08),
    }  # fmt: skip
    anatomy = {name: float(rng.uniform(*limits)) for name, limits in ranges.items()}
    return {**anatomy, "seed": int(rng.integers(2**31))}


class Scene:
    """A normal chest in one view, as layers [H, W] that add up to the picture.

    body     soft tissue, already as density
    air      share of aerated lung, 0 to 1 (a little more in a pneumothorax)
    vessels  lung markings; they show only where there is air around them
    bone, metal

    Signs change the layers, mostly through `fill`, and find their place through `place`, `lungs`, `ribs` (paths by
    side) and `marks` (named points), so that one function per sign serves the frontal and the lateral view.
    lungs[side] has the fields mask, zone (that half of the picture), depth (distance inwards from the chest wall) and
    height (above the diaphragm), and the y values top, base (of the dome) and bottom (of the costophrenic angle).
    """

    def __init__(self, view, anatomy, rng, height, width):
        self.a, self.frontal, self.shape = anatomy, view != "LATERAL", (height, width)
        self.magnify = 1.07 if view == "AP" else 1.0  # the heart lies in front, far from the AP detector
        # Small rotation, shift and zoom; a narrow picture shows a slightly smaller chest.
        angle, self.zoom = rng.normal(0, 0.03), rng.uniform(1.02, 1.14) * min(1, 0.25 + 0.85 * width / height)
        self.shift = rng.uniform(-0.05, 0.05, 2)
        self.turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        x, y = _grid(height, width)
        c, s = np.float32(np.cos(angle) / self.zoom), np.float32(np.sin(angle) / self.zoom)
        self.x, self.y = c * x + s * y - np.float32(self.shift[0]), c * y - s * x - np.float32(self.shift[1])
        self.lungs, self.ribs, self.air = {}, {-1: [], 1: []}, np.zeros(self.shape, np.float32)
        self.metal = np.zeros(self.shape, np.float32)
        (self._frontal if self.frontal else self._lateral)()
        self.fill(self.heart(1.0), 1.0 if self.frontal else 0.85)
        self.fill(self.mediastinum(1.0))
        self.vessels = self._vessel_tree()
        self.bone += self.rib_strokes(self.ribs[-1] + self.ribs[1])

    # -- tools for signs
    def fill(self, mask, amount=1.0):
        """Replaces air by something dense."""
        self.air *= 1 - amount * mask

    def stroke(self, paths, width):
        """Lines along paths (each [N, 2] points), `width` thick, antialiased: mask [H, W]."""
        height, columns = self.shape
        canvas = Image.new("L", (2 * columns, 2 * height))
        pen = ImageDraw.Draw(canvas)
        for path in paths:
            pixels = (np.asarray(path) + self.shift) @ self.turn.T * (self.zoom * height) + [columns, height]
            pen.line([tuple(p) for p in pixels], 255, max(1, round(width * self.zoom * height)), "curve")
        return np.asarray(canvas.reduce(2), np.float32) / 255

    def rib_strokes(self, paths):
        """Ribs: flat bands with a brighter cortex on both edges."""
        width = self.a["rib_width"]
        return (1.0 if self.frontal else 0.7) * (self.stroke(paths, width) - 0.5 * self.stroke(paths, 0.5 * width))

    def ellipse(self, centre, rx, ry, angle=0.0, edge=0.02):
        dx, dy = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        q = np.sqrt(((c * dx + s * dy) / rx) ** 2 + ((c * dy - s * dx) / ry) ** 2)
        return soft((1 - q) * min(rx, ry), edge)

    def blob(self, centre, radius):
        """A round patch without a border."""
        dx, dy = self.x - np.float32(centre[0]), self.y - np.float32(centre[1])
        return np.exp((dx * dx + dy * dy) * (-1 / radius**2))

    def noise(self, rng, scale):
        """Smooth noise, mean about 0.5, 0 to 1, with structures of about `scale`."""
        cells = [max(2, round(2 / scale * n / self.shape[0])) for n in self.shape]
        grid = Image.fromarray(rng.random(cells, np.float32))
        return np.clip(np.asarray(grid.resize(self.shape[::-1], Image.Resampling.BICUBIC)), 0, 1)

    def place(self, side, out, back, down):
        """The point (x, y) of a lung: out 0 to 1 from the midline to the chest wall (counts in frontal views), back
        0 to 1 from the sternum to the back (counts in lateral views), down 0 to 1 from the apex to the diaphragm."""
        y = self.lungs[side].top + (self.lungs[side].base - self.lungs[side].top) * down
        front, wall = self.wall(y)
        return (side * (0.10 + (wall - 0.10) * out), y) if self.frontal else (front + (wall - front) * back, y)

    # -- its parts
    def wall(self, y):
        """Inner borders of the chest wall at y: (midline, half width) in a frontal view, else (front, back)."""
        q = np.clip((0.25 - y) / (0.25 - self.a["top"]), 0, 1)
        reach = (1 - q**2.4) ** 0.55 * self.a["width"]
        return (0.0, 0.68 * reach) if self.frontal else (-0.50 * reach + 0.10 * q, 0.56 * reach)

    def heart(self, scale):
        """Mask of the heart, enlarged by `scale`."""
        grow, base, tilt = scale * self.a["heart"] * self.magnify, self.a["base"], self.a["tilt"]
        x, lift, rx, ry, edge = (0.12, 0.19, 0.335, 0.225, 0.03) if self.frontal else (-0.19, 0.16, 0.29, 0.20, 0.06)
        # It grows to the patient's left (frontal) and to the back (lateral), and stays on the diaphragm.
        centre = (x + 0.18 * (grow - 1), base - lift - 0.10 * (grow - 1))
        return self.ellipse(centre, rx * grow, ry * (0.4 + 0.6 * grow), tilt, edge)

    def mediastinum(self, scale):
        """Mask of the great vessels and what surrounds them, widened by `scale` in its upper part."""
        upper = soft(-0.02 - self.y, 0.35)  # the lower part keeps its width
        half = 0.12 * self.a["mediastinum"] * (1 + (scale - 1) * upper) + 0.05 * np.clip(self.y, -0.5, 0)
        if not self.frontal:
            middle = -0.02 - 0.06 * (scale - 1)
            band = soft(half - np.abs(self.x - middle - 0.1 * self.y), 0.08) * soft(0.15 - self.y, 0.2)
            return min(0.55 + 0.35 * (scale - 1), 0.9) * band
        knob = self.ellipse((0.03 + 0.08 * scale, -0.27), 0.075 * self.a["knob"], 0.085 * self.a["knob"])
        trunk = self.ellipse((0.105, -0.08), 0.08, 0.13)
        return np.maximum(np.maximum(soft(half - np.abs(self.x), 0.03), knob), trunk)

    def _frontal(self):
        a, x, y, r = self.a, self.x, self.y, np.abs(self.x)
        self.marks = {
            "mouth": (0.0, -1.1), "carina": (0.0, -0.30), "shoulder": (-0.62, -0.78), "vein": (-0.09, -0.42),
            "atrium": (-0.13, a["base"] - 0.26), "apex": (0.30, a["base"] - 0.10), "pocket": (0.47, -0.50),
            "gullet": (0.03, 0.0), "stomach": (0.30, a["base"] + 0.22), "hilum": (0.17, -0.02),
        }  # fmt: skip
        # Outline: neck, shoulders, trunk; the thickness falls off to the sides.
        trunk = np.interp(y, [-1.2, -0.98, -0.86, -0.7, -0.5, -0.1, 1.2], [0.20, 0.24, 0.50, 0.88, 1.0, 0.88, 0.90])
        self._soft_tissue(r, trunk)
        for side in SIDES:
            self.body += max(0.0, a["breast"]) * self.ellipse((side * 0.38, 0.20), 0.27, 0.30, edge=0.12)
            t = (r / a["width"] - 0.34) / 0.34
            base = a["base"] + (a["liver"] if side > 0 else 0.0)  # the liver lifts the right dome
            height = base + np.where(t > 0, 0.24, 0.07) * t * t - y
            zone = soft(side * x, 0.01)
            self._lung(side, self.wall(y)[1] - r, base, 0.24, height, soft(r - 0.03, 0.03), zone, 0.88)
        self._gas((0.34, a["base"] + 0.16), x + 0.01)
        self._spine(x - a["spine"] * np.sin(2 * y), 0.075, 0.6)
        up = a["clavicle"]
        clavicles = [curve((s * 0.06, -0.54), (s * 0.28, -0.57 - up), (s * 0.70, -0.60 - up)) for s in SIDES]
        blades = [curve((s * 0.80, -0.62), (s * 0.66, -0.35), (s * 0.70, -0.05)) for s in SIDES]  # edges of them
        self.bone += 0.5 * self.stroke(clavicles, 0.05)
        self.bone += 0.3 * self.stroke(blades, 0.06)
        for side in SIDES:
            self.bone += 0.5 * self.ellipse((side * 0.90, -0.56), 0.11, 0.12, edge=0.05)  # head of the humerus
            for y0 in a["top"] + 0.07 + a["rib_gap"] * np.arange(9):
                end = y0 + a["rib_slope"]
                reach = self.wall(end)[1] + 0.01
                bend = (side * 0.45 * reach, y0 - 0.035), (side * 0.84 * reach, y0 + 0.4 * a["rib_slope"])
                self.ribs[side].append(curve((side * 0.06, y0), *bend, (side * reach, end)))
        ends = [(side, *np.abs(rib[-1]) * [1, np.sign(rib[-1, 1])]) for side in SIDES for rib in self.ribs[side][:6]]
        fronts = [curve((s * ex, ey), (s * 0.50, ey + 0.20), (s * 0.26, ey + 0.26)) for s, ex, ey in ends]
        self.bone += 0.22 * self.stroke(fronts, 0.04)  # of the ribs, fainter

    def _lateral(self):
        a, x, y = self.a, self.x, self.y
        self.marks = {
            "mouth": (-0.02, -1.1), "carina": (0.08, -0.30), "shoulder": (-0.1, -0.8), "vein": (-0.03, -0.42),
            "atrium": (-0.06, a["base"] - 0.24), "apex": (-0.34, a["base"] - 0.07), "pocket": (-0.43, -0.42),
            "gullet": (0.20, 0.0), "stomach": (0.05, a["base"] + 0.2), "hilum": (0.05, -0.05),
        }  # fmt: skip
        r = np.abs(x - 0.03)
        trunk = np.interp(y, [-1.2, -0.95, -0.75, -0.3, 0.4, 1.2], [0.44, 0.52, 0.60, 0.68, 0.70, 0.66])
        self._soft_tissue(r, trunk)
        self.body += 0.12 * soft(-0.62 - y, 0.3) * (self.body > 0.2)  # shoulders and raised arms
        front, back = self.wall(y)
        t = (x + 0.14) / 0.62
        for side in SIDES:  # both lungs lie on each other
            base = a["base"] - 0.02 + (a["liver"] if side > 0 else 0.0)
            height = base + np.where(t > 0, 0.36, 0.25) * t * t - y
            self._lung(side, back - x, base, 0.28, height, soft(x - front, 0.03), 1.0, 0.43)
        self._gas((0.02, a["base"] + 0.15), x - 0.05 - 0.12 * (y + 0.6))
        self._spine(x - 0.40 * a["width"] + 0.02 - 0.07 * np.cos(2.2 * (y + 0.1)), 0.07, 0.9)
        sternum = curve((-0.36, -0.52), (-0.47, -0.2), (-0.53, 0.15)) * [a["width"], 1]
        self.bone += 0.8 * self.stroke([sternum], 0.045)
        self.bone += 0.35 * self.stroke([curve((0.50, -0.75), (0.42, -0.4), (0.36, -0.15))], 0.05)  # shoulder blade
        for side in SIDES:
            for y0 in a["top"] + 0.04 + 0.03 * side + a["rib_gap"] * np.arange(8):
                to_front, to_back = self.wall(y0 + 0.2)
                bend = (0.3 * to_back, y0 + 0.13), (0.5 * to_front, y0 + 0.27)
                self.ribs[side].append(curve((0.96 * to_back, y0), *bend, (0.85 * to_front, y0 + 0.30)))

    def _soft_tissue(self, r, trunk):
        thick, trunk = self.a["thick"], trunk.astype(np.float32) * self.a["width"] * self.a["thick"]
        self.body = (0.31 + 0.42 * np.sqrt(np.clip(1 - (r / trunk) ** 2, 0, 1))) * soft(trunk - r, 0.03) * thick
        self.body += 0.06 * soft(self.y - self.a["base"], 0.5)  # the belly is thicker

    def _lung(self, side, depth, base, sulcus, height, inner, zone, air):
        mask = soft(depth, 0.025) * soft(height, 0.03) * inner * zone
        self.lungs[side] = SimpleNamespace(
            mask=mask, zone=zone, depth=depth, height=height, top=self.a["top"], base=base, bottom=base + sulcus
        )
        self.air += air * mask

    def _gas(self, stomach, from_trachea):
        self.body -= self.a["gas"] * self.ellipse(stomach, 0.13, 0.055, -0.1, 0.03)
        self.body -= 0.13 * soft(0.034 - np.abs(from_trachea), 0.02) * soft(-0.24 - self.y, 0.1)

    def _spine(self, from_middle, half, density):
        discs = 0.72 + 0.28 * np.cos(self.y * (2 * np.pi / 0.14))
        self.bone = density * soft(half - np.abs(from_middle), 0.025) * discs

    def _vessel_tree(self):
        """Lung markings: branches fanning out from the hila, finer towards the wall."""
        rng, thick, thin = np.random.default_rng(self.a["seed"]), [], []
        hx, hy = self.marks["hilum"]
        for side in SIDES:
            root = (side * hx if self.frontal else hx, hy)
            for angle in np.linspace(-1.35, 1.35, 13) + rng.normal(0, 0.08, 13):
                reach, turns = rng.uniform(0.3, 0.5), angle + rng.normal(0, 0.5) * np.linspace(0, 1, 4)
                moves = reach / 4 * np.stack([side * np.cos(turns), 1.1 * np.sin(turns)], 1)
                steps = root + np.vstack([[0, 0], np.cumsum(moves, 0)])
                fork = steps[2] + 2 * (moves[3] + [[0, 0.1 * reach], [0, -0.1 * reach]])
                thick.append(steps[:3])
                thin += [steps[2:], [steps[2], fork[0]], [steps[2], fork[1]]]
        hila = self.blob((hx, hy), 0.10) + (self.blob((-hx, hy), 0.10) if self.frontal else 0)
        return 0.55 * self.stroke(thick, 0.024) + 0.35 * self.stroke(thin, 0.013) + 0.7 * hila


# ------------------------------------------------------------------------------------------------------ the signs
# Each takes the scene, a generator that is the same for all images of the study (so numbers are drawn in an order that
# does not depend on the view), and the strength k (1 = clear, FAINT = hardly visible).


def _side(rng):
    return int(rng.choice(SIDES))


def atelectasis(s, rng, k):
    """Plate-like bands over a raised hemidiaphragm."""
    side = _side(rng)
    s.fill(s.lungs[side].zone * soft(rng.uniform(0.04, 0.15) * k - s.lungs[side].height, 0.03))
    for _ in range(rng.integers(1, 4)):
        x, y = s.place(side, rng.uniform(0.45, 0.75), rng.uniform(0.35, 0.65), rng.uniform(0.60, 0.85))
        half, slope, width = rng.uniform(0.13, 0.22), rng.normal(0, 0.25), rng.uniform(0.030, 0.044)
        band = curve((x - half, y - half * slope), (x, y + 0.01), (x + half, y + half * slope))
        s.fill(s.stroke([band], width), 0.8 * k)


def cardiomegaly(s, rng, k):
    """A wide heart."""
    s.fill(s.heart(1 + k * rng.uniform(0.32, 0.55)))


def consolidation(s, rng, k):
    """A dense lobe with a sharp border at the fissure, and dark air-filled bronchi in it."""
    side, upper = _side(rng), rng.random() < 0.5
    slope, size, up = rng.normal(0, 0.2), rng.uniform(0.18, 0.36), -1 if upper else 1
    x, y = s.place(side, 0.5, 0.5, rng.uniform(0.38, 0.50) if upper else rng.uniform(0.50, 0.66))
    beyond = up * ((s.y - y) - slope * (s.x - x))  # distance from the fissure into the lobe
    mask = s.lungs[side].zone * soft(beyond, 0.02) * soft(size - beyond, 0.20)
    s.fill(mask, 0.85 * k)
    bronchi = [
        curve((x, y + 0.03 * up), (x + lean, y + 0.13 * up), (x + 1.6 * lean, y + 0.26 * up))
        for lean in rng.uniform(-0.16, 0.16, 4)
    ]
    s.air += 0.4 * k * mask * s.lungs[side].mask * s.stroke(bronchi, 0.022)


def edema(s, rng, k):
    """Haze around both hila, fuller vessels, short horizontal (Kerley) lines at the wall."""
    reach, amount, lines = rng.uniform(0.20, 0.32), rng.uniform(0.50, 0.75), []
    for side in 2 * SIDES * int(rng.integers(2, 4)):
        x, y = s.place(side, rng.uniform(0.84, 0.94), rng.uniform(0.75, 0.9), rng.uniform(0.55, 0.98))
        lines.append(curve((x - 0.06, y), (x + 0.06, y + 0.01)))
    s.fill(s.stroke(lines, 0.014), 0.5 * k)
    s.vessels *= 1 + 0.8 * k
    hx, hy = s.marks["hilum"]
    for centre in [(hx + 0.1, hy), (-hx - 0.1, hy)] if s.frontal else [(hx, hy)]:
        s.fill(s.blob(centre, reach) * (0.75 + 0.5 * s.noise(rng, 0.06)), amount * k)


def wide_mediastinum(s, rng, k):
    """A wide upper mediastinum."""
    s.fill(s.mediastinum(1 + k * rng.uniform(0.6, 1.2)))


def fracture(s, rng, k):
    """Neighbouring ribs broken: a gap, the outer part displaced, dense ends."""
    side, first, count = _side(rng), rng.integers(0, 3), rng.integers(3, 6)
    at, gap, step = rng.integers(9, 15), rng.integers(3, 5), [0, _side(rng) * rng.uniform(0.055, 0.075)]
    gone, moved = [], []
    for rib in s.ribs[side][first : first + count]:
        cut = at + int(rng.integers(-1, 2))
        gone.append(rib[cut - 1 :])
        moved.append(rib[cut + gap :] + step)
        for end in (rib[cut - 1], moved[-1][0]):
            s.bone += 1.5 * k * s.ellipse(end, 0.035, 0.035, edge=0.03)
    s.bone = np.clip(s.bone - s.rib_strokes(gone), 0, None) + s.rib_strokes(moved)


def lesion(s, rng, k):
    """Round nodules with a clear border."""
    for _ in range(rng.integers(1, 5)):
        side, radius = _side(rng), rng.uniform(0.065, 0.12)
        centre = s.place(side, rng.uniform(0.40, 0.75), rng.uniform(0.25, 0.8), rng.uniform(0.25, 0.85))
        s.fill(s.ellipse(centre, radius, radius * rng.uniform(0.85, 1.1), edge=0.02), 0.95 * k)


def opacity(s, rng, k):
    """One hazy patch without a border."""
    side, radius, amount = _side(rng), rng.uniform(0.17, 0.26), rng.uniform(0.7, 0.95)
    centre = s.place(side, rng.uniform(0.45, 0.75), rng.uniform(0.3, 0.75), rng.uniform(0.3, 0.85))
    s.fill(s.lungs[side].zone * s.blob(centre, radius) * (0.85 + 0.3 * s.noise(rng, 0.2)), np.sqrt(k) * amount * 0.9)


def effusion(s, rng, k):
    """Fluid that blunts the costophrenic angle and climbs up the wall as a meniscus."""
    for side in SIDES if rng.random() < 0.3 else [_side(rng)]:
        lung, level, climb = s.lungs[side], 0.06 + rng.uniform(0.06, 0.36) * k, rng.uniform(0.10, 0.18)
        meniscus = climb * np.exp(-np.clip(lung.depth, 0, None) / 0.10)
        s.fill(lung.zone * soft(s.y - (lung.bottom - level) + meniscus, 0.04))


def pleural(s, rng, k):
    """A thick pleura with calcified plaques along the chest wall and the dome of the diaphragm."""
    side, thick = _side(rng), rng.uniform(0.04, 0.09)
    lung = s.lungs[side]
    starts = rng.uniform(0.3, 0.95, 3)
    plaques = [curve(*[s.place(side, 0.95, 0.95, down + d) for d in (0, 0.07, 0.14)]) for down in starts]
    uneven = thick * (0.5 + s.noise(rng, 0.12))
    s.fill(lung.zone * soft(uneven - lung.depth, 0.02) * soft(s.y - lung.top - 0.25, 0.1), 0.8 * k)
    dome = lung.mask * soft(0.03 - np.abs(lung.height - 0.02), 0.01) * soft(0.12 - np.abs(lung.depth - 0.27), 0.02)
    s.bone += 1.4 * k * np.maximum(s.stroke(plaques, 0.034), dome)


def pneumonia(s, rng, k):
    """Several patches with a coarse, mottled texture."""
    patches = 0.0
    for side in [_side(rng)] * 3 + [_side(rng)] * 2:
        centre = s.place(side, rng.uniform(0.3, 0.8), rng.uniform(0.25, 0.8), rng.uniform(0.35, 0.95))
        patches = patches + s.blob(centre, rng.uniform(0.09, 0.15))
    amount = rng.uniform(0.75, 1.0) * k
    s.fill(np.minimum(1.3 * patches, 1) * soft(s.noise(rng, 0.06) - 0.42, 0.5), amount)


def pneumothorax(s, rng, k):
    """Air without lung markings above and beside a thin pleural line."""
    side, wide = _side(rng), rng.uniform(0.15, 0.30) * (0.5 + 0.5 * k)
    lung, end, apex, corner = s.lungs[side], rng.uniform(0.1, 0.5), rng.uniform(0.9, 1.4) * wide, 0.2
    beside = lung.depth - wide * np.clip((end - s.y) / (end - lung.top), 0, 1)
    below = s.y - lung.top - apex
    # Distance out of the shrunken lung, whose outer upper corner is round.
    out = np.hypot(np.clip(corner - beside, 0, None), np.clip(corner - below, 0, None)) - corner
    free = lung.mask * soft(out, 0.02)
    s.vessels *= 1 - free
    s.air += (0.40 if s.frontal else 0.32) * k * free * (s.air > 0.2)
    s.bone += 1.1 * k * lung.mask * soft(0.016 - np.abs(out), 0.012) * soft(end - s.y, 0.05)


def devices(s, rng, k):
    """Tubes, catheters and pacemakers, one to three of them."""
    m, wobble = s.marks, rng.normal(0, 0.02, (4, 2)) * [[0], [1], [1], [1]]
    names = rng.choice(["tube", "feeding", "catheter", "pacemaker"], rng.integers(1, 4), replace=False)

    def line(width, *points):
        return k * s.stroke([curve(*(wobble[: len(points)] + [m[p] for p in points]), n=40)], width)

    if "tube" in names:  # in the trachea
        s.metal += 0.6 * line(0.045, "mouth", "carina") + 0.6 * line(0.014, "mouth", "carina")
    if "feeding" in names:  # down to the stomach
        s.metal += line(0.028, "mouth", "carina", "gullet", "stomach")
    if "catheter" in names:  # from the shoulder into the great vein
        s.metal += line(0.028, "shoulder", "vein", "atrium")
    if "pacemaker" in names:
        s.metal += line(0.024, "pocket", "vein", "atrium", "apex")
        s.metal = np.maximum(s.metal, k * s.ellipse(m["pocket"], 0.12, 0.095 if s.frontal else 0.04, 0.4, 0.015))


SIGNS = {  # in drawing order: what lies on top comes last
    "Cardiomegaly": cardiomegaly,
    "Enlarged Cardiomediastinum": wide_mediastinum,
    "Edema": edema,
    "Lung Opacity": opacity,
    "Pneumonia": pneumonia,
    "Lung Lesion": lesion,
    "Consolidation": consolidation,
    "Atelectasis": atelectasis,
    "Pneumothorax": pneumothorax,
    "Pleural Effusion": effusion,
    "Pleural Other": pleural,
    "Fracture": fracture,
    "Support Devices": devices,
}  # No Finding has none


# ------------------------------------------------------------------------------------------------------- pictures
def frame(rng, size):
    """(height, width) of a picture, the first thing that its generator decides."""
    shorter = int(rng.choice([0.82, 0.9, 1.0, 1.0]) * size)
    return (shorter, size) if rng.random() < 0.3 else (size, shorter)


def render(signs, view, anatomy, study_seed, image_seed, size):
    """One picture before clipping, float32 [H, W], max(H, W) == size: 0 is black and 1 white, and metal, markers and
    borders go beyond (a DICOM file keeps that, its window clips it).

    signs: {label: strength}; study_seed fixes side, place and extent of the signs for all images of a study.
    """
    rng = np.random.default_rng(image_seed)
    height, width = frame(rng, size)
    zoom = min(max(size, 192), 384) / size  # very small and very large pictures are drawn at a moderate size
    scene = Scene(view, anatomy, rng, round(height * zoom), round(width * zoom))
    for label, sign in SIGNS.items():
        if label in signs:  # each with its own stream: adding a sign never moves another one
            sign(scene, np.random.default_rng([study_seed, LABELS.index(label)]), signs[label])
    vessels = VESSEL * scene.vessels * np.clip(scene.air, 0, 1)
    picture = scene.body - AIR * scene.air + vessels + BONE * scene.bone + METAL * scene.metal
    picture = picture.astype(np.float32)
    if zoom != 1:
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    return _mark(_expose(picture, rng), view, rng)


def _expose(picture, rng):
    """Uneven scatter, exposure, contrast, gamma and noise, none of which knows the labels."""
    x, y = _grid(*picture.shape)
    picture = np.clip(picture + rng.normal(0, 0.02) * x + rng.normal(0, 0.02) * y, 0, 1.5)
    picture = 0.5 + rng.uniform(1.0, 1.35) * (picture - rng.uniform(0.46, 0.56))
    picture = np.clip(picture, 0, None) ** np.float32(rng.uniform(0.85, 1.2))
    grain = rng.standard_normal(picture.shape, np.float32)
    return (picture + np.float32(rng.uniform(0.008, 0.03)) * grain).astype(np.float32)


def _mark(picture, view, rng):
    """Dark collimator borders and a side marker, at random."""
    height, width = picture.shape
    for end in (picture, picture[::-1], picture.T, picture.T[::-1]):  # views: top, bottom, left, right
        if rng.random() < 0.3:
            end[: int(rng.uniform(0.01, 0.05) * len(end))] = -0.25
    letter, shown = "R" if rng.random() < 0.4 else "L", rng.random() < 0.8
    scale, left, top = height * rng.uniform(0.035, 0.055), rng.uniform(0.06, 0.10), rng.uniform(0.06, 0.14)
    left = 0.96 - left if letter == "L" and view != "LATERAL" else left  # the patient's left is on the right
    outline = {
        "L": [(0, 0), (0, 1), (0.6, 1)],
        "R": [(0, 1), (0, 0), (0.55, 0.05), (0.55, 0.45), (0, 0.5), (0.2, 0.5), (0.6, 1)],
    }[letter]
    canvas = Image.new("L", (width, height))
    points = [(width * left + scale * x, height * top + scale * y) for x, y in outline]
    ImageDraw.Draw(canvas).line(points, 255, max(1, round(scale / 5)))
    return np.where(np.asarray(canvas) > 0, np.float32(1.3), picture) if shown else picture


def draw(labels, view, rng, anatomy=None, size=320):
    """A synthetic chest X-ray, float32 [H, W] in [0, 1], bright = dense, max(H, W) == size.

    labels: label names, or {label: strength} (1 = clear, FAINT = hardly visible); view: PA, AP or LATERAL; anatomy:
    from `random_anatomy`, by default a new one. The same state of rng with and without a label gives the same
    picture with and without that sign.
    """
    if not 64 <= size <= 4096:
        raise ValueError(f"size={size}: choose 64 to 4096 pixels; signs vanish below, and nothing is gained above.")
    signs = labels if isinstance(labels, dict) else dict.fromkeys(labels, 1.0)
    if set(signs) - set(LABELS) or view not in VIEWS:
        raise ValueError(f"labels={sorted(signs)}, view={view!r}: use labels of {LABELS} and a view of {VIEWS}.")
    own, (study_seed, image_seed) = random_anatomy(rng), rng.integers(2**31, size=2).tolist()
    return np.clip(render(signs, view, anatomy or own, study_seed, image_seed, size), 0, 1)
