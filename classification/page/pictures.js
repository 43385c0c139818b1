// Bytes of a JPG, PNG or another picture that browsers know -> grayscale, as dataset/files/images.py reads it.

const begins = (bytes, text) => [...text].every((letter, k) => bytes[k] === letter.charCodeAt(0));

function checkSize(width, height) {
  if (width * height >= 1 && width * height <= 100e6) return;
  throw new Error(`the header has ${height} x ${width} pixels; at most 100 million are read`);
}
// Whether the end marker of JPEG, JPEG-LS and JPEG 2000 is behind a position.
const hasEnd = (bytes, start) => bytes.some((byte, k) => k > start && byte === 0xff && bytes[k + 1] === 0xd9);
// {width, height, bits, components} of a JPEG or JPEG-LS with an end marker: decoders invent pixels that are missing.
function jpegHeader(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  let frame = null;
  for (let at = 2; at + 9 < bytes.length; ) {
    const marker = bytes[at + 1], segment = bytes[at] === 0xff && marker !== 0xff && marker !== 0xd8;
    if (segment && ((marker >> 4 === 12 && ![0xc4, 0xc8, 0xcc].includes(marker)) || marker === 0xf7)) { // a start of frame
      frame ??= { bits: bytes[at + 4], height: view.getUint16(at + 5), width: view.getUint16(at + 7), components: bytes[at + 9] };
    }
    if (segment && marker === 0xda && frame && hasEnd(bytes, at)) return frame; // compressed data follow
    if (segment && marker === 0xda) break;
    at += segment ? 2 + Math.max(2, view.getUint16(at + 2)) : 1;
  }
  throw new Error("cut short: the JPEG data are truncated");
}
// RGBA bytes {data, width, height} by the browser: upright, and in the picture's own numbers.
async function decodeByBrowser(bytes, type) {
  const asStored = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type }), asStored).catch(() => {
    throw new Error("neither JPG, PNG nor DICOM that can be read: damaged, or another kind of file");
  });
  const { width, height } = bitmap;
  checkSize(width, height);
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return { data: context.getImageData(0, 0, width, height).data, width, height };
}
// Bytes -> {data, width, height, notes}.
async function readPicture(bytes, shrinkTo) {
  const jpeg = begins(bytes, "\xff\xd8\xff"), png = begins(bytes, "\x89PNG");
  if (begins(bytes, "II*\0") || begins(bytes, "MM\0*")) throw new Error("TIFF is not read by browsers; save it as PNG");
  if (jpeg) jpegHeader(bytes);
  if (png && !begins(bytes.subarray(-8), "IEND")) throw new Error("cut short: the PNG data are truncated");
  if (png && bytes[24] === 16) throw new Error("a PNG of 16 bits, of which browsers keep 8; convert it to 8 bits, or open the DICOM");
  const { data, width, height } = await decodeByBrowser(bytes, jpeg ? "image/jpeg" : "");
  const gray = new Uint8Array(width * height);
  let coloured = 0;
  for (let k = 0; k < gray.length; k++) {
    const r = data[4 * k], g = data[4 * k + 1], b = data[4 * k + 2];
    if (Math.max(r, g, b) - Math.min(r, g, b) > 24) coloured++;
    gray[k] = (19595 * r + 38470 * g + 7471 * b + 32768) >> 16; // ITU-R 601, as Pillow rounds it
  }
  const notes = coloured > 0.05 * gray.length ? ["This looks like no radiograph: the picture is coloured."] : [];
  const factor = jpeg ? draftFactor(width, height, shrinkTo) : 1;
  return { ...reduce({ data: gray, width, height }, factor, (sum, count) => roundEven(sum / count)), notes };
}
