// A grayscale picture {data: Uint8Array, width, height} -> what the model takes, as predict.py prepares it.

// Half to even, as NumPy and Python round.
const roundEven = (x) => (Math.abs(x % 1) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x));
const pillowMean = (sum, count) => Math.floor(((sum + (count >> 1)) * Math.trunc(Math.fround(2 ** 24 / count))) / 2 ** 24);
// Means over blocks of factor x factor pixels; at the right and lower border the blocks are smaller.
function reduce(gray, factor, mean = pillowMean) {
  if (factor < 2) return gray;
  const width = Math.ceil(gray.width / factor), height = Math.ceil(gray.height / factor);
  const data = new Uint8Array(width * height);
  for (let at = 0; at < data.length; at++) {
    const x = (at % width) * factor, y = Math.floor(at / width) * factor;
    const right = Math.min(gray.width, x + factor), lower = Math.min(gray.height, y + factor), count = (right - x) * (lower - y);
    let sum = 0;
    for (let j = y; j < lower; j++) for (let i = x; i < right; i++) sum += gray.data[j * gray.width + i];
    data[at] = mean(sum, count);
  }
  return { data, width, height };
}
// The whole factor by which Pillow decodes a JPG of this size smaller (`draft`); libjpeg then takes means of blocks.
function draftFactor(width, height, shrinkTo) {
  const factor = Math.max(1, Math.min(width, height) / shrinkTo);
  const most = Math.min(...[width, height].map((n) => Math.floor(n / Math.floor(n / factor))));
  return factor < 2 ? 1 : [8, 4, 2].find((scale) => scale <= most);
}

const bicubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : ((-0.5 * x + 2.5) * x - 4) * x + 2);
// Of each of `to` pixels [the first of `from` pixels, the weights from there on], with antialias; and how many bits the weights
// are shifted: they are whole numbers of 16 bits, as those of torch.
function resampling(from, to, interpolation) {
  const [reach, kernel] = interpolation === "bicubic" ? [2, bicubic] : [1, (x) => 1 - x], wide = Math.max(from / to, 1);
  const exact = Array.from({ length: to }, (_, k) => {
    const center = (from / to) * (k + 0.5), first = Math.max(0, Math.trunc(center - reach * wide + 0.5));
    const count = Math.min(from, Math.trunc(center + reach * wide + 0.5)) - first;
    const distances = Array.from({ length: count }, (_, j) => Math.abs((first + j - center + 0.5) / wide));
    const weights = distances.map((x) => (x < reach ? kernel(x) : 0)), sum = weights.reduce((a, b) => a + b);
    return [first, weights.map((w) => w / sum)];
  });
  const most = exact.reduce((a, [, weights]) => Math.max(a, ...weights), 0);
  const bits = Math.min(22, Math.ceil(Math.log2(32767.5 / most)) - 1);
  const whole = (w) => Math.trunc(w * 2 ** bits + (w < 0 ? -0.5 : 0.5));
  return [exact.map(([first, weights]) => [first, weights.map(whole)]), bits];
}
// Gray levels [height x width] of another size: columns first, then rows, rounded each time.
function resize(gray, width, height, interpolation) {
  const pass = (data, from, to, count, step, stride, newStride) => {
    if (from === to) return data;
    const out = new Uint8ClampedArray(to * count), [pixels, bits] = resampling(from, to, interpolation);
    pixels.forEach(([first, weights], k) => {
      for (let line = 0; line < count; line++) {
        let sum = 1 << (bits - 1);
        for (let j = 0; j < weights.length; j++) sum += weights[j] * data[line * stride + (first + j) * step];
        out[line * newStride + k * step] = sum >> bits;
      }
    });
    return out;
  };
  const narrow = pass(gray.data, gray.width, width, gray.height, 1, gray.width, width);
  return pass(narrow, gray.height, height, width, width, 1, 1);
}
// The middle size x size of a square of `side` pixels, float32 [1, 3, size, size]; about: the metadata of the ONNX file.
function prepare(gray, about) {
  const { side, size, mean, std } = about, longest = Math.max(gray.width, gray.height), out = new Float32Array(3 * size * size);
  const fit = (n) => (about.resize === "pad" ? Math.max(1, Math.floor((side * n) / longest)) : side);
  const [width, height] = [fit(gray.width), fit(gray.height)];
  const small = resize(gray, width, height, about.interpolation);
  const [left, top] = [width, height].map((n) => roundEven((side - size) / 2) - Math.floor((side - n) / 2));
  for (let at = 0; at < size * size; at++) {
    const x = (at % size) + left, y = Math.floor(at / size) + top;
    const value = x >= 0 && y >= 0 && x < width && y < height ? small[y * width + x] : 0; // black where it was padded
    for (let c = 0; c < 3; c++) out[c * size * size + at] = (value / 255 - mean[c]) / std[c];
  }
  return out;
}
// What part of the picture that is: left, top, right, bottom in its pixels; beyond its border where black was added.
function placement({ width, height }, about) {
  const part = about.size / about.side / 2, longest = Math.max(width, height);
  const [w, h] = [width, height].map((n) => part * (about.resize === "pad" ? longest : n));
  return [width / 2 - w, height / 2 - h, width / 2 + w, height / 2 + h];
}
