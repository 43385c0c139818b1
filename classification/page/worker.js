// The worker: reads a file, prepares it and asks the model, so that the page never stands still.
// It gets {files: name -> bytes, about} once, then {bytes} of each picture; every message has one answer.

let about, files, session, codecs = {};
const addressOf = (name) => URL.createObjectURL(new Blob([files[name]], { type: "text/javascript" }));
const loadModule = (name) => import(addressOf(needed(name)));

function needed(name) {
  if (files[`runtime/${name}`]) return `runtime/${name}`;
  throw new Error(`this page was made without ${name.split("/")[0]}, by which such a file is read`);
}
// A decoder of @cornerstonejs: its script defines a function, which takes its WebAssembly and returns the decoder.
function loadCodec(name) {
  return (codecs[name] ??= (async () => {
    importScripts(addressOf(needed(`${name}.js`)));
    const make = name.includes("charls") ? self.CharLSWASM : self.OpenJPEGWASM;
    return make({ wasmBinary: files[needed(`${name}.wasm`)], print() {} });
  })());
}

async function start(given) {
  ({ about, files } = given);
  if (files["runtime/dicom-parser/dicomParser.min.js"]) importScripts(addressOf(needed("dicom-parser/dicomParser.min.js")));
  const { wasm } = ort.env, runtime = "onnxruntime-web/ort-wasm-simd-threaded", model = files["model.onnx"];
  wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1; // others need an isolated page
  wasm.wasmPaths = { mjs: addressOf(needed(`${runtime}.mjs`)) };
  wasm.wasmBinary = files[needed(`${runtime}.wasm`)];
  try {
    session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  } catch (error) {
    const text = String(error.message ?? error).split("\n")[0], memory = /alloc|memory|bounds|^\d+$/i.test(text);
    const cause = memory ? "this browser has not enough memory for it" : "this onnxruntime-web cannot run it";
    throw new Error(`${cause} (${Math.round(model.length / 1e6)} MB): ${text}`);
  }
  files["model.onnx"] = null; // the session has its own copy
}

async function answer({ bytes }) {
  const started = performance.now();
  if (!bytes.length) throw new Error("the file is empty");
  const dicom = isDicom(bytes), found = await (dicom ? readDicom(bytes, about) : readPicture(bytes, about.shrink_to));
  const shortest = Math.min(found.width, found.height);
  if (shortest < 16) throw new Error(`${found.height} x ${found.width} pixels are too few for an X-ray`);
  const images = prepare(reduce(found, Math.floor(shortest / about.shrink_to)), about);
  const output = await session.run({ images: new ort.Tensor("float32", images, [1, 3, about.size, about.size]) });
  const gray = reduce(found, Math.floor(shortest / 1024)), seconds = (performance.now() - started) / 1000; // shown: enough to zoom
  const maps = output.maps && { data: output.maps.data, width: output.maps.dims[3], height: output.maps.dims[2] };
  const notes = [...found.notes, about.source_notes[dicom ? "dicom" : "pictures"]].filter(Boolean);
  return { gray, seen: placement(gray, about), probabilities: [...output.probabilities.data], maps, notes, seconds };
}

onmessage = async ({ data }) => {
  postMessage(await (data.files ? start(data) : answer(data)).catch((error) => ({ fault: error.message ?? String(error) })));
};
