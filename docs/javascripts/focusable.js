// Material for MkDocs wraps each table in a container that scrolls sideways on a phone. The keyboard must reach it too.
document$.subscribe(() => {
  for (const container of document.querySelectorAll(".md-typeset__scrollwrap")) {
    container.tabIndex = 0;
    container.setAttribute("role", "region");
    container.setAttribute("aria-label", "Table");
  }
});
