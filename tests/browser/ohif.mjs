// Drives OHIF, as the server under test serves it, in a headless Chromium, and reports what the page shows.
//
//     node ohif.mjs scenario.json > report.json
//
// scenario: {server, chromium, folder, studies: [{name, uid, steps: [...]}]}; a step is one of
//     {name, run: model, options: {option: value}}               Auto-Segmentation, after setting options in their dialog
//     {name, run: model, stop: true}                             the same, given up by a click on the line that says how far it is
//     {name, click: [x, y, z] (LPS mm), model, label, background}  Point Prompts; background: the click is not on the label
//     {name, press: button, strategy}                            a button of Active Learning, after picking a strategy
//     {name, save: segment's name}                               Save as DICOM SEG, every segment under that name
// report: {left: addresses beyond this machine that were asked for and refused, errors: of the page,
//     studies: [{name, viewports, tabs: of the panel, colours, steps: [{name, url, params, status, notice, coloured, labels}]}]}
// colours: label -> [r, g, b] of the segmentation in the page; coloured: viewport -> how many of its pixels are not gray
// labels: the segmentation that the page holds: {dimensions, spacing, origin, direction (LPS), data: base64 of uint8}
// A screenshot of every step goes to folder as <study>-<step>.png.

import { readFileSync } from 'node:fs';
import { chromium } from 'playwright-core';

const FLAGS = [
  '--no-sandbox', '--no-first-run', '--disable-quic', '--disable-background-networking', '--disable-component-update',
  '--disable-sync', '--use-gl=angle', '--use-angle=swiftshader', '--enable-unsafe-swiftshader', '--ignore-gpu-blocklist',
];
const PATIENCE = 90_000; // ms for any one thing; a machine busy with something else is slow

const scenario = JSON.parse(readFileSync(process.argv[2]));
const report = { left: [], errors: [], studies: [] };

const browser = await chromium.launch({ executablePath: scenario.chromium, args: FLAGS });
try {
  const context = await browser.newContext({ viewport: { width: 1440, height: 780 } });
  context.setDefaultTimeout(PATIENCE);
  await context.route('**/*', route => {
    const url = new URL(route.request().url());
    if (['127.0.0.1', 'localhost'].includes(url.hostname) || ['data:', 'blob:'].includes(url.protocol)) return route.continue();
    report.left.push(url.href);
    return route.abort();
  });
  for (const study of scenario.studies) {
    const page = await context.newPage();
    page.on('pageerror', error => report.errors.push(`${study.name}: ${error.message}`));
    const viewports = await open(page, study.uid);
    await connect(page);
    const steps = [];
    const tabs = await page.locator('.monaiLabelPanel .tab-label:visible').allInnerTexts();
    report.studies.push({ name: study.name, viewports, steps, tabs, colours: await colours(page) });
    for (const step of study.steps) {
      const act = { click, press, save }[['click', 'press', 'save'].find(kind => kind in step)] ?? run;
      const done = await act(page, step);
      steps.push({ name: step.name, ...done, ...(await shown(page)) });
      await page.screenshot({ path: `${scenario.folder}/${study.name}-${step.name}.png` });
    }
    await page.close();
  }
} catch (error) {
  for (const page of browser.contexts().flatMap(c => c.pages())) {
    await page.screenshot({ path: `${scenario.folder}/failure.png` }).catch(() => {});
  }
  console.error(error.stack, JSON.stringify({ ...report, studies: undefined }));
  process.exitCode = 1;
} finally {
  await browser.close();
}
console.log(JSON.stringify(report));

/** Open a study; resolves to the ids of the viewports once every one shows the whole volume. */
async function open(page, uid) {
  await page.goto(`${scenario.server}/ohif/monai-label?StudyInstanceUIDs=${uid}`, { waitUntil: 'commit' });
  const notice = page.getByText('Confirm and Hide'); // on the first visit only
  await notice.or(page.locator('#monailabelServerURL')).first().waitFor();
  await page.waitForFunction(() => {
    const shown = window.services?.cornerstoneViewportService?.getRenderingEngine?.()?.getViewports() ?? [];
    const volumes = shown.map(v => window.cornerstone.cache.getVolume(v.getAllVolumeIds?.()[0]));
    return shown.length > 0 && shown.every(v => v.viewportStatus === 'rendered') && volumes.every(v => v?.loadStatus?.loaded);
  });
  if (await notice.isVisible()) await notice.click();
  await page.evaluate(() => {
    window.segmentationChanges = 0;
    window.cornerstone.eventTarget.addEventListener(window.cornerstoneTools.Enums.Events.SEGMENTATION_DATA_MODIFIED, () => {
      window.segmentationChanges += 1;
    });
  });
  return page.evaluate(() => window.services.cornerstoneViewportService.getRenderingEngine().getViewports().map(v => v.id));
}

/** Connect the MONAI Label panel; resolves once the empty segmentation it makes is there. */
async function connect(page) {
  await page.locator('.settingsTable button').click(); // the server's address is there already
  await page.getByText('Auto-Segmentation', { exact: true }).waitFor();
  await page.waitForFunction(() => window.services.segmentationService.getLabelmapVolume('1')?.voxelManager);
}

/** Label -> [r, g, b]; the panel gives segments their colours one second after it has made them. */
async function colours(page) {
  const read = () =>
    page.evaluate(() => {
      const { segments } = window.services.segmentationService.getSegmentation('1');
      const { color } = window.cornerstoneTools.segmentation.config;
      return Object.fromEntries(
        Object.values(segments).map(s => [s.label, Array.from(color.getSegmentIndexColor('mpr-axial', '1', s.segmentIndex)).slice(0, 3)])
      );
    });
  await page.waitForTimeout(1500);
  let found = await read();
  // On a busy machine the viewport gets its colours later than that.
  for (let previous = null, waited = 0; waited < 20 && JSON.stringify(found) !== previous; waited++) {
    previous = JSON.stringify(found);
    await page.waitForTimeout(1500);
    found = await read();
  }
  return found;
}

async function run(page, { run: model, options, stop }) {
  if (options) {
    await page.getByText('Options / Configurations').first().click();
    await page.locator('select[name=selectSection]').selectOption('infer');
    await page.locator('select[name=selectName]').selectOption(model);
    for (const [name, value] of Object.entries(options)) {
      const field = page.locator(`[id="infer${model}${name}"]`);
      if (await field.evaluate(e => e.tagName === 'SELECT')) await field.selectOption(value);
      else await field.fill(value);
    }
    await page.getByRole('button', { name: 'Confirm', exact: true }).click();
  }
  const tab = await opened(page, 'Auto-Segmentation');
  await tab.locator('select').selectOption(model);
  const act = () => tab.getByRole('button', { name: 'Run', exact: true }).click();
  return stop ? stopped(page, act) : answered(page, act);
}

/** Do what sends a request, and give it up. */
async function stopped(page, act) {
  const line = page.getByText(/step \d+ of .* \(click here to stop\)/);
  const failed = page.waitForEvent('requestfailed', r => r.url().includes('/infer/'));
  await act();
  const notice = await line.innerText(); // waits for it
  await line.click();
  const request = await failed;
  await page.locator('#zeroseg-message').waitFor({ state: 'detached' });
  return { status: 0, url: request.url(), notice };
}

async function click(page, { click: world, model, label, background }) {
  const tab = await opened(page, 'Point Prompts');
  const models = tab.locator('select');
  if ((await models.inputValue()) !== model) await models.selectOption(model); // picking one forgets all clicks
  const pick = name => tab.getByRole('cell', { name, exact: true }).click();
  await pick(background ? 'background' : label);
  const before = await page.evaluate(clicks);
  const [x, y] = await page.evaluate(point => {
    const viewports = window.services.cornerstoneViewportService.getRenderingEngine().getViewports();
    for (const viewport of viewports) { // a person would scroll there
      const { focalPoint, position, viewPlaneNormal } = viewport.getCamera();
      const away = point.reduce((sum, p, axis) => sum + (p - focalPoint[axis]) * viewPlaneNormal[axis], 0);
      const along = from => from.map((p, axis) => p + away * viewPlaneNormal[axis]);
      viewport.setCamera({ focalPoint: along(focalPoint), position: along(position) });
      viewport.render();
    }
    const viewport = viewports.find(v => v.id === 'mpr-axial');
    const [u, v] = viewport.worldToCanvas(point);
    const box = viewport.element.getBoundingClientRect();
    return [box.left + u, box.top + v];
  }, world);
  await page.mouse.click(x, y);
  while ((await page.evaluate(clicks)) === before) await page.waitForTimeout(50);
  if (background) await pick(label); // the answer goes to the label that is picked
  return answered(page, () => tab.getByRole('button', { name: 'Run', exact: true }).click());
}

/** In the page: how many clicks it shows, which are those of the label picked. */
function clicks() {
  const shown = window.cornerstoneTools.annotation.state.getAllAnnotations();
  return shown.filter(a => a.metadata.toolName === 'ProbeMONAILabel').length;
}

async function press(page, { press: button, strategy }) {
  const tab = page.locator('.tab', { has: page.getByText('Active Learning', { exact: true }) });
  if (!(await tab.locator('input.tab-switch').isChecked())) await tab.getByText('Active Learning', { exact: true }).click();
  if (strategy) await tab.locator('select').selectOption(strategy);
  const [response] = await Promise.all([
    page.waitForResponse(r => r.request().method() === 'POST' && /\/(train|activelearning)\//.test(r.url())),
    tab.getByRole('button', { name: button, exact: true }).click(),
  ]);
  const notice = response.ok() ? null : await page.locator('#zeroseg-message').innerText();
  const answer = await response.json();
  if (response.ok()) await page.keyboard.press('Escape'); // the form that offers to open the next image
  return { status: response.status(), url: response.url(), answer, notice };
}

async function save(page, { save: name }) {
  await page.locator('#zeroseg-save-button').click();
  for (const field of await page.locator('#zeroseg-save input[maxlength]').all()) await field.fill(name);
  const [response] = await Promise.all([
    page.waitForResponse(r => r.url().includes('/datastore/label')),
    page.locator('#zeroseg-save').getByRole('button', { name: 'Save', exact: true }).click(),
  ]);
  const notice = await page.locator('#zeroseg-message').innerText();
  return { status: response.status(), url: response.url(), notice };
}

async function opened(page, title) {
  const tab = page.locator('.tab', { has: page.getByText(title, { exact: true }) });
  await tab.getByText(title, { exact: true }).click();
  return tab;
}

/** Do what sends a request, and wait for its answer and for the page to have taken it in. */
async function answered(page, act) {
  const changes = await page.evaluate(() => window.segmentationChanges);
  const before = await coloured(page);
  const [response] = await Promise.all([page.waitForResponse(r => r.url().includes('/infer/')), act()]);
  const request = response.request().postData();
  const params = JSON.parse(/name="params"\s+(\{.*\})/s.exec(request)?.[1] ?? '{}');
  let notice = null;
  if (response.ok()) {
    await page.waitForFunction(count => window.segmentationChanges > count, changes);
    await redrawn(page, before);
  } else {
    // The page may still show how far the answer was.
    notice = await page.locator('#zeroseg-message', { hasNotText: 'click here to stop' }).innerText();
  }
  return { status: response.status(), url: response.url(), params, notice };
}

/** Resolves once the pictures have changed and then stay: a segmentation is drawn a few frames after the page has it. */
async function redrawn(page, before) {
  const latest = Date.now() + 20_000; // what lies outside the slices shown changes no picture
  let [last, same] = [JSON.stringify(before), 0];
  for (let changed = false; same < 3 && Date.now() < latest; ) {
    await page.waitForTimeout(200);
    const now = JSON.stringify(await coloured(page));
    changed ||= now !== JSON.stringify(before);
    same = changed && now === last ? same + 1 : 0;
    last = now;
  }
}

/** Viewport id -> how many of its pixels are coloured: the images are gray, a segmentation is not. */
function coloured(page) {
  return page.evaluate(() =>
    Object.fromEntries(
      window.services.cornerstoneViewportService.getRenderingEngine().getViewports().map(({ id, canvas }) => {
        const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
        let count = 0;
        for (let i = 0; i < data.length; i += 4) {
          const [r, g, b] = data.subarray(i, i + 3);
          if (Math.max(r, g, b) - Math.min(r, g, b) > 16) count += 1;
        }
        return [id, count];
      })
    )
  );
}

async function shown(page) {
  const labels = await page.evaluate(() => {
    const volume = window.services.segmentationService.getLabelmapVolume('1');
    const values = volume.voxelManager.getCompleteScalarDataArray();
    let text = '';
    for (const value of values) text += String.fromCharCode(value);
    const { dimensions, spacing, origin, direction } = volume;
    const plain = v => Array.from(v);
    return {
      dimensions: plain(dimensions), spacing: plain(spacing), origin: plain(origin), direction: plain(direction), data: btoa(text),
    };
  });
  return { coloured: await coloured(page), labels };
}
