// Runs before every other script of a page (see _config.yml).
{
  // A first visit has no stored choice of colours, which the theme logs as an error: follow the system's.
  const page = document.documentElement;
  page.dataset.mode ||= "auto";
  page.dataset.theme ||= matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";

  // FontAwesome's observer would swap the icons inside a widget's buttons for pictures of its own;
  // the Play button then looks for its icon in vain and throws on every click.
  window.FontAwesomeConfig = { observeMutations: false };

  // A widget with a label calls MathJax 2 by its Hub. MathJax 3 has none, and the widget would stay empty
  // whenever MathJax happens to arrive first. Our labels are plain text, so the call may do nothing.
  let mathjax;
  Object.defineProperty(window, "MathJax", {
    get: () => mathjax,
    set: (value) => (mathjax = Object.assign(value, { Hub: { Queue() {} } })),
  });

  // Where require.js, which reads its settings from here, finds the module behind our own widgets.
  const root = new URL(page.dataset.content_root || "./", document.baseURI).href;
  window.require = { paths: { anywidget: root + "_static/anywidget/index" } };
}

document.addEventListener("DOMContentLoaded", () => {
  for (const arrow of document.querySelectorAll("summary:has(.toctree-toggle)"))
    arrow.setAttribute("aria-label", "Show or hide the pages below");
  // From the disk, a page may not read others to quote from them.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined")
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
});
