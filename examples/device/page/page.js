// Loads a .tflite file with the signatures initial, adapt and infer, adapts it to the samples of data.json, and shows what that changes.
import { loadAndCompile, loadLiteRt, Tensor } from '@litertjs/core';

const $ = (id) => document.getElementById(id);
const floats = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

// A small picture of a sample: an image, or a line for each sensor.
function draw(values, shape, canvas) {
  const context = canvas.getContext('2d');
  const low = Math.min(...values), range = Math.max(...values) - low || 1;
  if (shape.length === 3) {
    const [height, width, channels] = shape;
    [canvas.width, canvas.height] = [width, height];
    const picture = context.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      for (let c = 0; c < 3; c++) picture.data[4 * i + c] = (255 * (values[i * channels + (channels === 3 ? c : 0)] - low)) / range;
      picture.data[4 * i + 3] = 255;
    }
    context.putImageData(picture, 0, 0);
  } else {
    const [times, sensors] = shape;
    [canvas.width, canvas.height] = [112, 112];
    for (let s = 0; s < sensors; s++) {
      context.strokeStyle = `hsl(${(360 * s) / sensors} 65% 45%)`;
      context.beginPath();
      for (let t = 0; t < times; t++) context.lineTo((112 * t) / times, 112 - (112 * (values[t * sensors + s] - low)) / range);
      context.stroke();
    }
  }
}

function show(part, shape, into) {
  const size = shape.reduce((a, b) => a * b);
  part.labels.slice(0, 48).forEach((label, i) => {
    const canvas = document.createElement('canvas');
    canvas.title = `class ${label}`;
    draw(part.images.subarray(i * size, (i + 1) * size), shape, canvas);
    into.append(canvas);
  });
}

async function classify(model, params, part, shape) {
  const size = shape.reduce((a, b) => a * b);
  const predictions = [];
  for (let i = 0; i < part.labels.length; i++) {
    const images = new Tensor(part.images.slice(i * size, (i + 1) * size), [1, ...shape]);
    const { logits } = await model.run('infer', { ...params, images });
    const values = logits.toTypedArray();
    predictions.push(values.indexOf(Math.max(...values)));
    images.delete();
    logits.delete();
  }
  return predictions;
}

function report(name, predictions, labels) {
  const accuracy = predictions.filter((p, i) => p === labels[i]).length / labels.length;
  $(name).style.width = `${100 * accuracy}%`;
  $(`${name}-text`).textContent = `${(100 * accuracy).toFixed(1)} %`;
  [...$('test').children].forEach((canvas, i) => (canvas.className = predictions[i] === labels[i] ? 'right' : 'wrong'));
  return accuracy;
}

async function main() {
  const data = await (await fetch('data.json')).json();
  for (const part of [data.train, data.test]) part.images = floats(part.images);
  const { shape } = data;
  $('what').textContent = `${data.title}. Classes here: ${data.classes.join(', ')}.`;
  $('count').textContent = data.train.labels.length;
  show(data.train, shape, $('train'));
  show(data.test, shape, $('test'));
  await loadLiteRt('./node_modules/@litertjs/core/wasm/');
  const model = await loadAndCompile('model.tflite', { accelerator: 'wasm' });
  const initial = await model.run('initial', {});
  const before = report('before', await classify(model, initial, data.test, shape), data.test.labels);
  $('adapt').disabled = false;
  $('adapt').onclick = () => adapt().catch(failed);
  async function adapt() {
    $('adapt').disabled = true;
    const rows = data.samples, size = shape.reduce((a, b) => a * b), count = data.train.labels.length;
    const images = new Float32Array(rows * size), labels = new Int32Array(rows), weight = new Float32Array(rows);
    images.set(data.train.images);
    labels.set(data.train.labels);
    weight.fill(1, 0, count); // rows beyond the samples do not count
    const start = performance.now();
    const adapted = await model.run('adapt', {
      ...initial, images: new Tensor(images, [rows, ...shape]), labels: new Tensor(labels, [rows]), weight: new Tensor(weight, [rows]) });
    const milliseconds = performance.now() - start;
    $('time').textContent = `adapted in ${milliseconds.toFixed(0)} ms`;
    const after = report('after', await classify(model, adapted, data.test, shape), data.test.labels);
    document.body.dataset.result = JSON.stringify({ before, after, milliseconds }); // for tests
  }
  if (new URLSearchParams(location.search).has('auto')) $('adapt').click();
}

function failed(error) {
  $('what').textContent = `It does not work here: ${error.message}`;
  document.body.dataset.error = error.message;
}

main().catch(failed);
