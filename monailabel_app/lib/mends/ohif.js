// OHIF's MONAI Label panel looks for its server on port 8000, unless a cookie names another one: it is the one this page is from.
document.cookie = `MONAILABEL_SERVER_URL=${escape(`${location.origin}/`)}`;

// Colours of segment_01 to segment_16, as far from each other as 16 colours can be.
window.zerosegColours = (
  'e6194b 3cb44b ffe119 4363d8 f58231 911eb4 42d4f4 f032e6 bfef45 fabed4 469990 dcbeff 9a6324 fffac8 800000 aaffc3'
).split(' ').map((value, k) => ({ label: `segment_${String(k + 1).padStart(2, '0')}`, value: `#${value}` }));

// The panel says only "Failed to Run" when a request fails. This shows the server's reason beside it, until the next request.
(() => {
  const show = text => {
    const box = document.createElement('div');
    box.setAttribute('role', 'alert');
    box.id = 'zeroseg-message';
    box.textContent = `ZeroSeg: ${text}`;
    box.style.cssText =
      'position:fixed;bottom:24px;left:50%;transform:translateX(-50%);z-index:99999;max-width:60ch;padding:12px 18px;' +
      'border-radius:6px;background:#7a1f1f;color:#fff;font:14px sans-serif;cursor:pointer';
    box.onclick = () => box.remove();
    document.getElementById(box.id)?.remove();
    document.body.append(box);
    setTimeout(() => box.remove(), 12000);
  };
  const reason = request => {
    const body = request.responseType === 'arraybuffer' ? new TextDecoder().decode(request.response) : request.responseText;
    try {
      const detail = JSON.parse(body).detail;
      return typeof detail === 'string' ? detail : JSON.stringify(detail);
    } catch {
      return `the server answered ${request.status}`;
    }
  };
  const open = XMLHttpRequest.prototype.open;
  XMLHttpRequest.prototype.open = function (method, url, ...rest) {
    if (/\/(infer|datastore)\//.test(String(url))) {
      document.getElementById('zeroseg-message')?.remove();
      this.addEventListener('load', () => this.status >= 400 && show(reason(this)));
    }
    return open.call(this, method, url, ...rest);
  };
})();
