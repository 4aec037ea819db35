// Narrow the lists of claims on a page down, by words and by verdict.
(() => {
  const box = document.currentScript.parentElement;
  const words = box.querySelector("input");
  const verdict = box.querySelector("select");
  const said = box.querySelector("output");
  const narrow = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    const entries = document.querySelectorAll("section[data-verdict]");
    for (const entry of entries) {
      const text = entry.textContent.toLowerCase();
      const fits = wanted.every((word) => text.includes(word));
      const kept = fits && (!verdict.value || entry.dataset.verdict === verdict.value);
      entry.hidden = !kept;
      shown += kept;
    }
    said.textContent = `${shown} of ${entries.length} shown`;
  };
  words.addEventListener("input", narrow);
  verdict.addEventListener("change", narrow);
})();
