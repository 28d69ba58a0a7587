// OHIF's MONAI Label panel says only "Failed to Run" when a request fails. This shows the server's reason beside it.
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
      this.addEventListener('load', () => this.status >= 400 && show(reason(this)));
    }
    return open.call(this, method, url, ...rest);
  };
})();
