// OHIF's MONAI Label panel looks for its server on port 8000, unless a cookie names another one: it is the one this page is from.
document.cookie = `MONAILABEL_SERVER_URL=${escape(`${location.origin}/`)}`;

// Colours of segment_01 to segment_16, as far from each other as 16 colours can be.
window.zerosegColours = (
  'e6194b 3cb44b ffe119 4363d8 f58231 911eb4 42d4f4 f032e6 bfef45 fabed4 469990 dcbeff 9a6324 fffac8 800000 aaffc3'
).split(' ').map((value, k) => ({ label: `segment_${String(k + 1).padStart(2, '0')}`, value: `#${value}` }));

// React's object behind an element, the nearest one that has a method of this name; OHIF's panel keeps its state there.
const zerosegComponent = (element, method) => {
  let fiber = element?.[Object.keys(element).find(key => key.startsWith('__reactFiber$'))];
  while (fiber && !fiber.stateNode?.[method]) fiber = fiber.return;
  return fiber?.stateNode;
};

// A line at the bottom of the page, until it is clicked or the next request.
const zerosegShow = (text, color = '#7a1f1f') => {
  const box = document.createElement('div');
  box.setAttribute('role', 'alert');
  box.id = 'zeroseg-message';
  box.textContent = `ZeroSeg: ${text}`;
  box.style.cssText =
    'position:fixed;bottom:24px;left:50%;transform:translateX(-50%);z-index:99999;max-width:60ch;padding:12px 18px;' +
    `border-radius:6px;background:${color};color:#fff;font:14px sans-serif;cursor:pointer`;
  box.onclick = () => box.remove();
  document.getElementById(box.id)?.remove();
  document.body.append(box);
  setTimeout(() => box.remove(), 12000);
};

// While an answer takes long: how far it is. A click on the line gives it up, and the server stops at its next step.
const zerosegFollow = request => {
  let line, over;
  const timer = setInterval(async () => {
    const { queue } = await fetch('/info/').then(answer => answer.json()).catch(() => ({}));
    if (over || !queue?.length) return; // a request given up is in no state that says so
    const [{ seconds, done, total }] = queue;
    const step = total ? `step ${done + 1} of ${total}, ` : '';
    const others = queue.length > 1 ? `, ${queue.length} requests at the server` : '';
    zerosegShow(`${step}${Math.round(seconds ?? 0)} s${others} (click here to stop)`, '#1f4d7a');
    line = document.getElementById('zeroseg-message');
    line.onclick = () => request.abort();
  }, 1000);
  request.addEventListener('loadend', () => {
    over = true;
    clearInterval(timer);
    line?.remove();
  });
};

// The panel says only that a request failed. This shows the server's reason beside it.
(() => {
  const reason = request => {
    const body = request.responseType === 'arraybuffer' ? new TextDecoder().decode(request.response) : request.responseText;
    try {
      const { detail } = JSON.parse(body);
      return typeof detail === 'string' ? detail : JSON.stringify(detail);
    } catch {
      return `the server answered ${request.status}`;
    }
  };
  // The panel knows segments by the names the server declared when it connected: which noun names which of them is said beside it.
  const names = request => {
    const body = request.response instanceof ArrayBuffer ? new TextDecoder().decode(request.response) : '';
    const found = JSON.parse(/"label_names":\s*(\{[^{}]*\})/.exec(body)?.[1] ?? '{}');
    const given = Object.entries(found).filter(([name]) => !/^segment_\d\d$/.test(name));
    return given.map(([name, value]) => `segment_${String(value).padStart(2, '0')} is ${name}`).join(', ');
  };
  const open = XMLHttpRequest.prototype.open;
  XMLHttpRequest.prototype.open = function (method, url, ...rest) {
    const asked = /\/(infer|datastore|train|activelearning)\//.exec(String(url))?.[1];
    // The panel looks whether a training runs, and 404 says that none does.
    if (asked && !(asked === 'train' && method.toUpperCase() === 'GET')) {
      document.getElementById('zeroseg-message')?.remove();
      if (asked === 'infer') zerosegFollow(this);
      this.addEventListener('load', () => {
        if (this.status >= 400) zerosegShow(reason(this));
        else if (/\/infer\/segments\b/.test(String(url)) && names(this)) zerosegShow(names(this), '#1f4d7a');
        else if (asked === 'activelearning' && this.responseText === '{}') zerosegShow('every image has its label', '#1f4d7a');
        else if (asked === 'train' && method.toUpperCase() === 'POST') zerosegWatchTraining();
      });
    }
    return open.call(this, method, url, ...rest);
  };
})();

// Follow a training to its end, say how it ended, and let the panel know: of itself it goes on offering to stop it.
const zerosegWatchTraining = async () => {
  let task = { status: 'RUNNING' };
  while (['SUBMITTED', 'RUNNING'].includes(task.status)) {
    await new Promise(resolve => setTimeout(resolve, 2000));
    task = await fetch('/train/').then(answer => answer.json()).catch(() => ({}));
  }
  const tab = document.querySelector('input[name=activelearning]');
  zerosegComponent(tab, 'onClickUpdateModel')?.setState({ training: false });
  const panel = zerosegComponent(document.querySelector('.monaiLabelPanel'), 'onInfo');
  if (panel) {
    await panel.onInfo(panel.serverURI);
    await new Promise(resolve => setTimeout(resolve));
    zerosegAddSegments(panel);
  }
  if (task.status === 'DONE') zerosegShow('the model was updated: task learned', '#1f5c2e');
  else if (task.status === 'ERROR') zerosegShow(`the training failed: ${task.details?.at(-1) ?? 'see the log'}`);
};

// Labels that the server has learned since the panel made its segments.
const zerosegAddSegments = panel => {
  const { segmentationService } = window.services;
  const segments = segmentationService.getSegmentations()[0]?.config?.segments;
  for (const label of segments ? panel.state.info.labels : []) {
    if (Object.values(segments).some(segment => segment.label === label)) continue;
    const segmentIndex = Math.max(0, ...Object.keys(segments).map(Number)) + 1;
    const color = panel.segmentColor(label);
    segmentationService.addSegment('1', { segmentIndex, label, color: [...color] });
    segments[segmentIndex] = { segmentIndex, label, color };
  }
};

// The panel offers the strategies and asks for "random" whatever is chosen.
document.addEventListener('change', event => {
  const tab = event.target.closest?.('.tab')?.querySelector('input[name=activelearning]');
  if (tab && event.target.tagName === 'SELECT') {
    zerosegComponent(tab, 'onClickUpdateModel')?.setState({ strategy: event.target.value });
  }
});

// Save what is on screen: every segment that has voxels, under a name of the user's, as a DICOM SEG in the study.
(() => {
  const held = () => {
    const volume = window.services?.segmentationService?.getLabelmapVolume('1');
    return new Uint8Array(volume?.voxelManager?.getCompleteScalarDataArray() ?? []);
  };
  const input = (value, index) => {
    const row = document.createElement('label');
    row.style.cssText = 'display:flex;gap:8px;align-items:center;margin:4px 0';
    row.innerHTML = '<span style="min-width:2em"></span><input maxlength="64" style="flex:1;color:#000;padding:2px 6px">';
    row.firstChild.textContent = index;
    Object.assign(row.lastChild, { value, name: `segment-${index}` });
    return row;
  };
  const save = async (dialog, series, voxels, names, rtstruct) => {
    const button = dialog.querySelector('[type=submit]');
    button.disabled = true;
    const form = new FormData();
    const label_info = names.map(([idx, name]) => ({ idx, name }));
    form.append('params', JSON.stringify({ label_info, rtstruct }));
    form.append('label', new Blob([voxels]), 'label.bin');
    document.getElementById('zeroseg-message')?.remove();
    const request = fetch(`/datastore/label?image=${encodeURIComponent(series)}&tag=final`, { method: 'PUT', body: form });
    const answer = await request.catch(error => ({ json: async () => ({ detail: `not saved: ${error.message}` }) }));
    if (answer.ok) {
      zerosegShow(`saved ${names.map(([, name]) => name).join(', ')} in the study`, '#1f5c2e');
      return dialog.remove();
    }
    zerosegShow((await answer.json().catch(() => ({}))).detail ?? `the server answered ${answer.status}`);
    button.disabled = false;
  };
  const ask = () => {
    const voxels = held();
    const present = [...new Set(voxels)].filter(Boolean).sort((a, b) => a - b);
    if (!present.length) return zerosegShow('there is no segment to save: draw or run one first');
    const segments = window.services.segmentationService.getSegmentations()[0].config.segments;
    const panel = zerosegComponent(document.querySelector('.monaiLabelPanel'), 'getActiveViewportInfo');
    // Of what is on screen now: another viewport may be the active one when the names are given.
    const series = panel.getActiveViewportInfo().displaySet.SeriesInstanceUID;
    const dialog = document.createElement('form');
    dialog.id = 'zeroseg-save';
    dialog.style.cssText =
      'position:fixed;top:20%;left:50%;transform:translateX(-50%);z-index:99998;width:360px;max-height:60%;overflow:auto;' +
      'padding:16px;border-radius:6px;background:#041c4a;color:#fff;font:14px sans-serif';
    dialog.append('Names of the segments', ...present.map(index => input(segments[index]?.label ?? `segment ${index}`, index)));
    const more = document.createElement('div');
    more.innerHTML =
      '<label style="display:block;margin:8px 0"><input type="checkbox" name="rtstruct"> contours as well (RTSTRUCT)</label>' +
      '<button type="submit">Save</button> &nbsp; <button type="button">Cancel</button>';
    more.querySelector('label').hidden = !panel?.state.info.data?.rtstruct;
    more.querySelector('[type=button]').onclick = () => dialog.remove();
    dialog.append(more);
    dialog.onsubmit = event => {
      event.preventDefault();
      const names = present.map(index => [index, dialog.elements[`segment-${index}`].value.trim() || `segment ${index}`]);
      save(dialog, series, voxels, names, dialog.elements.rtstruct.checked);
    };
    // OHIF's keyboard shortcuts.
    dialog.addEventListener('keydown', event => event.stopPropagation());
    document.getElementById(dialog.id)?.remove();
    document.body.append(dialog);
  };
  const dress = () => {
    const tabs = document.querySelector('.monaiLabelPanel .tabs');
    if (!tabs || document.getElementById('zeroseg-save-button')) return;
    // "Class Prompts" asks a model for some of its labels by number, which no task here understands.
    for (const tab of tabs.querySelectorAll('.tab')) {
      if (tab.querySelector('.tab-label')?.textContent === 'Class Prompts') tab.style.display = 'none';
    }
    const button = document.createElement('button');
    button.id = 'zeroseg-save-button';
    button.textContent = 'Save as DICOM SEG';
    button.style.cssText = 'width:100%;margin:8px 0;padding:4px;background:lightgray;color:#000;font-size:smaller';
    button.onclick = ask;
    tabs.before(button);
  };
  document.addEventListener('DOMContentLoaded', () => {
    new MutationObserver(dress).observe(document.body, { childList: true, subtree: true });
  });
})();
