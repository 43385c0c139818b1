// Bytes of a DICOM -> grayscale in which bright means dense: dataset/files/dicom.py and display.py in script.
// dicom-parser reads the header; packages decode JPEG 2000, JPEG-LS and JPEG Lossless, the browser plain JPEG.

const [IMPLICIT, EXPLICIT, BIG_ENDIAN] = ["1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"];
const TAGS = Object.fromEntries(`SOPClassUID 00080016 Modality 00080060 BodyPartExamined 00180015 SamplesPerPixel 00280002
  PhotometricInterpretation 00280004 NumberOfFrames 00280008 Rows 00280010 Columns 00280011 BitsAllocated 00280100 BitsStored 00280101
  HighBit 00280102 PixelRepresentation 00280103 PixelPaddingValue 00280120 PixelPaddingRangeLimit 00280121 WindowCenter 00281050
  WindowWidth 00281051 RescaleIntercept 00281052 RescaleSlope 00281053 VOILUTFunction 00281056 ModalityLUTSequence 00283000
  LUTDescriptor 00283002 LUTData 00283006 VOILUTSequence 00283010 PixelData 7fe00010`
  .match(/\w+ \w+/g).map((pair) => pair.split(" ")));
const isDicom = (bytes) => begins(bytes.subarray(128), "DICM") || begins(bytes, "\x02\0") || begins(bytes, "\x08\0");
// A data set of dicom-parser, its elements by name.
class Header {
  constructor(set, little) { Object.assign(this, { set, little }); }
  element(name) {
    const found = this.set.elements[`x${TAGS[name]}`];
    return found?.length || found?.items ? found : null;
  }
  text(name) {
    return ((this.element(name) && this.set.string(`x${TAGS[name]}`)) || "").replace(/[\0 ]+$/, "").toUpperCase();
  }
  binary(name, kind = Uint16Array, word = kind.BYTES_PER_ELEMENT) { // word: how many bytes big endian turns around
    const { dataOffset, length } = this.element(name) ?? { length: 0 };
    const bytes = this.set.byteArray.slice(dataOffset, dataOffset + length);
    const { buffer } = this.little ? bytes : bytes.map((_, k) => bytes[k ^ (word - 1)]);
    return new kind(buffer, 0, Math.floor(length / kind.BYTES_PER_ELEMENT));
  }
  integer(name, missing) { return this.binary(name)[0] ?? missing; }
  numbers(name) { // NaN for what is none; some writers use a decimal comma, or binary numbers
    const kind = { FL: Float32Array, FD: Float64Array, US: Uint16Array, SS: Int16Array }[this.element(name)?.vr];
    const number = (text) => (text.trim() && Math.abs(text.replace(",", ".")) <= 1e30 ? Number(text.replace(",", ".")) : NaN);
    return kind ? [...this.binary(name, kind)] : this.text(name) ? this.text(name).split("\\").map(number) : [];
  }
  items(name) { return (this.element(name)?.items ?? []).map((item) => new Header(item.dataSet, this.little)); }
}

function parse(bytes) {
  if (!self.dicomParser) throw new Error("this page was made without dicom-parser: it reads JPG and PNG");
  try {
    const bare = !begins(bytes.subarray(128), "DICM") && (/[A-Z]/.test(String.fromCharCode(bytes[4])) ? EXPLICIT : IMPLICIT);
    const syntax = bare || dicomParser.readPart10Header(bytes).string("x00020010");
    if (![IMPLICIT, EXPLICIT, BIG_ENDIAN].includes(syntax) && !DECODERS[syntax]) return { syntax }; // nothing is inflated
    return { syntax, header: new Header(dicomParser.parseDicom(bytes, bare ? { TransferSyntaxUID: bare } : {}), syntax !== BIG_ENDIAN) };
  } catch {
    throw new Error("cut short or damaged: the file ends within the header or the pixels of the DICOM");
  }
}
// What a file shows that is no chest radiograph, by its header; "" for one, or where the header does not say.
function otherContent(header) {
  const modality = header.text("Modality"), part = header.text("BodyPartExamined");
  if (modality && !/\b(CR|DX|DR|RG|XR|RX|OT|SC)\b/.test(modality)) return `Modality ${modality}`;
  const kind = header.text("SOPClassUID").replace("1.2.840.10008.5.1.4.1.1.", "");
  if (kind && !/^(1|1\.1|1\.1\.1|7(\.\d)?)$/.test(kind)) return `SOPClassUID ${header.text("SOPClassUID")}`;
  const chest = /CHEST|TH?[OÓ]RA[XC]|LUNG|PULMON|CXR|^(UNKNOWN|OTHER|NONE|N\/A|)$/.test(part) && !/SPINE|BREAST/.test(part);
  return chest ? "" : `BodyPartExamined ${part}`;
}

// ------------------------------------------------------------------------------------------ the pixels
// {data: integers, width, height}: the values as stored.
async function storedValues(header, syntax) {
  const missing = ["PixelData", "Rows", "Columns", "BitsAllocated", "BitsStored"].find((name) => !header.element(name));
  if (missing) throw new Error(`the DICOM has no ${missing}: cut short, or not an image`);
  const [height, width, allocated, stored] = ["Rows", "Columns", "BitsAllocated", "BitsStored"].map((name) => header.integer(name));
  const samples = header.integer("SamplesPerPixel", 1), frames = Number(header.text("NumberOfFrames") || 1);
  const kind = header.text("PhotometricInterpretation"), gray = frames === 1 && samples === 1 && /^MONOCHROME[12]$/.test(kind);
  checkSize(width, height);
  if (!gray) throw new Error(`not a single grayscale image: ${frames} frame(s), ${samples} sample(s) a pixel, ${kind}`);
  const possible = [8, 16, 32].includes(allocated) && stored >= 1 && stored <= allocated;
  if (!possible) throw new Error(`${stored} of ${allocated} bits a pixel; all of 8, 16 or 32 are read`);
  const size = { width, height, allocated }, { vr, length, fragments } = header.element("PixelData");
  let words, precision = allocated;
  if (DECODERS[syntax]) {
    const parts = (fragments ?? []).map((part) => header.set.byteArray.subarray(part.position, part.position + part.length));
    ({ words, precision } = await DECODERS[syntax](new Uint8Array(await new Blob(parts).arrayBuffer()), size));
  } else {
    if (fragments || length < (width * height * allocated) / 8) throw new Error("cut short: bytes of pixels are missing");
    const type = { 8: Uint8Array, 16: Uint16Array, 32: Uint32Array }[allocated];
    words = header.binary("PixelData", type, vr === "OW" ? Math.max(2, allocated / 8) : undefined);
  }
  // PS3.5 8.1.1: the value is in some bits of the word, up to HighBit; the others may hold anything.
  const bits = Math.min(stored, precision), signed = header.integer("PixelRepresentation", 0) === 1;
  let end = header.integer("HighBit", bits - 1) + 1;
  if (precision === bits || end < bits || end > precision) end = bits;
  const data = bits > 16 ? new Float64Array(width * height) : new Int32Array(width * height);
  for (let k = 0; k < data.length; k++) {
    const raised = words[k] << (32 - end);
    data[k] = signed ? raised >> (32 - bits) : raised >>> (32 - bits);
  }
  return { data, width, height };
}
// PS3.5 annex G: a run for each byte of a word, the highest first.
function unpackRle(frame, { width, height, allocated }) {
  const view = new DataView(frame.buffer), words = new Uint32Array(width * height);
  for (let run = 0; run < allocated / 8; run++) {
    let at = view.getUint32(4 + 4 * run, true);
    for (let to = 0; to < words.length; ) {
      if (at >= frame.length) throw new Error("cut short: the RLE data end early");
      const head = view.getInt8(at++), count = Math.min(head === -128 ? 0 : Math.abs(head) + 1, words.length - to);
      for (let k = 0; k < count; k++) words[to++] = (words[to - 1] << 8) | frame[head < 0 ? at : at + k];
      at += head === -128 ? 0 : head < 0 ? 1 : head + 1;
    }
  }
  return { words, precision: allocated };
}
// Each decoder gets the compressed frame and {width, height, allocated}: {words, precision: how many bits they have}.
function checkFrame({ width, height, components, bits }, size) {
  if (components !== 1) throw new Error(`not a single grayscale image: ${components} samples a pixel`);
  if (width === size.width && height === size.height) return bits;
  throw new Error(`the pixels are ${height} x ${width}, the header has ${size.height} x ${size.width}`);
}

async function plainJpeg(frame, size) {
  const bits = checkFrame(jpegHeader(frame), size);
  if (bits !== 8) throw new Error(`JPEG of ${bits} bits is not read by browsers; convert it to an uncompressed DICOM`);
  return { words: (await decodeByBrowser(frame, "image/jpeg")).data.filter((_, k) => k % 4 === 0), precision: 8 };
}
async function losslessJpeg(frame, size) {
  const precision = checkFrame(jpegHeader(frame), size);
  const { Decoder } = await loadModule("jpeg-lossless-decoder-js/lossless-min.js");
  const output = new Decoder().decompress(frame.buffer, 0, frame.length);
  return { words: precision > 8 ? new Uint16Array(output) : new Uint8Array(output), precision };
}
async function byCornerstone(name, Decoder, frame, size) {
  const codec = await loadCodec(name), decoder = new codec[Decoder]();
  decoder.getEncodedBuffer(frame.length).set(frame);
  decoder.decode();
  const found = decoder.getFrameInfo(), bytes = decoder.getDecodedBuffer().slice(), precision = found.bitsPerSample;
  decoder.delete();
  checkFrame({ ...found, components: found.componentCount }, size);
  return { words: precision > 8 ? new Uint16Array(bytes.buffer) : bytes, precision };
}
function jpegLs(frame, size) {
  checkFrame(jpegHeader(frame), size);
  return byCornerstone("codec-charls/charlswasm_decode", "JpegLSDecoder", frame, size);
}
function jpeg2000(frame, size) {
  if (hasEnd(frame, 40)) return byCornerstone("codec-openjpeg/openjpegwasm_decode", "J2KDecoder", frame, size);
  throw new Error("cut short: the JPEG 2000 data are truncated");
}
const DECODERS = { "1.2.840.10008.1.2.5": unpackRle };
[[50, plainJpeg], [51, plainJpeg], [57, losslessJpeg], [70, losslessJpeg], [80, jpegLs], [81, jpegLs], [90, jpeg2000], [91, jpeg2000]]
  .forEach(([last, decode]) => (DECODERS[`1.2.840.10008.1.2.4.${last}`] = decode));

// ------------------------------------------------------------------------------------------ the display
const ramp = (low, high) => (high > low ? (v) => Math.min(1, Math.max(0, (v - low) / (high - low))) : (v) => Number(v > low));
// The first lookup table of a sequence that is valid, or the one at `index`: {at: value -> entry, most: the largest}.
function lookupTable(header, sequence, index, signed) {
  const tables = header.items(sequence).map((item) => {
    let [count, first, bits] = item.binary("LUTDescriptor"), entries = item.binary("LUTData");
    count ||= 65536; // which 16 bits do not hold
    if (entries.length < count) [entries, bits] = [item.binary("LUTData", Uint8Array, 2), 8];
    if (bits === undefined || entries.length < count) return null;
    if (first >= 32768 && signed) first -= 65536;
    const needed = 32 - Math.clz32(entries.reduce((a, b) => Math.max(a, b), 0));
    if (needed > bits || bits > 16 || (bits === 16 && needed <= 12)) bits = Math.max(needed, 8); // the entries are believed
    return { at: (v) => entries[Math.min(count - 1, Math.max(0, v - first))], most: 2 ** bits - 1 };
  });
  return tables[index] ?? tables.find(Boolean);
}
// Modality values -> 0 to 1 by the VOI LUT or window `index`, or the first that is valid; null without one.
function valuesOfInterest(header, index, negative) {
  const table = lookupTable(header, "VOILUTSequence", index, negative);
  if (table) return (v) => table.at(roundEven(v)) / table.most;
  const centers = header.numbers("WindowCenter"), widths = header.numbers("WindowWidth");
  const pairs = centers.map((center, k) => (!Number.isNaN(center) && widths[k] > 0 ? [center, widths[k]] : null));
  const lone = [centers.filter((v) => !Number.isNaN(v)), widths.filter((v) => v > 0)]; // a number each, beside what is none
  const pair = pairs[index] ?? pairs.find(Boolean) ?? (lone.every((list) => list.length === 1) ? lone.flat() : null);
  if (!pair) return null;
  const [center, width] = pair, kind = header.text("VOILUTFunction") || "LINEAR";
  if (kind === "SIGMOID") return (v) => 1 / (1 + Math.exp((-4 * (v - center)) / width));
  const exact = kind === "LINEAR_EXACT" || (kind === "LINEAR" && width < 1);
  return ramp(center - width / 2, center + width / 2 - (exact ? 0 : 1));
}
// Whether a stored value is padding. The header may have it in the other signedness.
function paddingTest(header, signed) {
  const bits = header.integer("BitsStored"), least = signed ? -(2 ** (bits - 1)) : 0;
  const given = ["PixelPaddingValue", "PixelPaddingRangeLimit"].map((name) => header.integer(name)).filter((v) => v !== undefined);
  const ends = given.map((v) => (signed ? [(v << 16) >> 16, (v << (32 - bits)) >> (32 - bits)] : [v, v % 2 ** bits]))
    .map((same) => same.find((v) => v >= least && v < least + 2 ** bits));
  if (!header.element("PixelPaddingValue") || ends.includes(undefined)) return () => false;
  return (v) => v >= Math.min(...ends) && v <= Math.max(...ends);
}

function extremes(values) { // the lowest and the highest
  let [low, high] = [values[0], values[0]];
  for (const v of values) if (v < low) low = v; else if (v > high) high = v;
  return [low, high];
}
// `level` of every value, worked out once a value where these are few.
function eachOnce(level, { data, width, height }) {
  const [low, high] = extremes(data), few = high - low < 65536;
  const table = few && Uint8Array.from({ length: high - low + 1 }, (_, k) => level(low + k));
  return { data: new Uint8Array(data.map(table ? (v) => table[v - low] : level)), width, height };
}

const RECIPES = {
  window(stored, header, index, invert) {
    const signed = header.integer("PixelRepresentation", 0) === 1, padded = paddingTest(header, signed);
    const seen = stored.data.filter((v) => !padded(v)), table = lookupTable(header, "ModalityLUTSequence", 0, signed);
    if (!seen.length) throw new Error("all pixels are padding");
    let slope = header.numbers("RescaleSlope")[0] ?? 1, intercept = header.numbers("RescaleIntercept")[0] ?? 0;
    if (!slope || Number.isNaN(slope + intercept)) [slope, intercept] = [1, 0];
    const modality = table ? table.at : (v) => v * slope + intercept;
    const voi = valuesOfInterest(header, index, !table && (signed || slope < 0 || intercept < 0)) ??
      ramp(...extremes((table ? seen : extremes(seen)).map(modality)));
    return eachOnce((v) => (padded(v) ? 0 : invert(roundEven(255 * voi(modality(v))))), stored);
  },
  mimic_jpg(stored, _header, _index, invert) { // as the JPG release was made: no window, histogram equalisation
    const [low, high] = extremes(stored.data), counts = new Array(256).fill(0);
    const image = eachOnce((v) => invert(Math.trunc(((v - low) / Math.max(high - low, 1)) * 255)), stored);
    for (const v of image.data) counts[v]++;
    const lowest = counts.find((count) => count), factor = 255 / (image.data.length - lowest);
    let sum = 0;
    const equal = counts.map((count) => Math.max(0, roundEven(((sum += count) - lowest) * factor)));
    return factor < Infinity ? { ...image, data: image.data.map((v) => equal[v]) } : image;
  },
};

// Bytes -> {data, width, height, notes}; about: the metadata of the ONNX file.
async function readDicom(bytes, about) {
  const { header, syntax } = parse(bytes);
  if (!header) throw new Error(`transfer syntax ${syntax} is not supported; convert it to an uncompressed DICOM`);
  const other = otherContent(header), inverted = header.text("PhotometricInterpretation") === "MONOCHROME1";
  const invert = (v) => (inverted ? 255 - v : v);
  try {
    const image = RECIPES[about.dicom_recipe](await storedValues(header, syntax), header, about.dicom_window, invert);
    return { ...image, notes: other ? [`This looks like no chest radiograph: its header has ${other}.`] : [] };
  } catch (error) {
    throw new Error((other ? `no chest radiograph (${other}): ` : "") + (error.message ?? "the compressed pixels are damaged"));
  }
}
