// What the theme leaves out for people who use a keyboard or a screen reader.

// Landmarks of one page need names of their own: the theme gives a menu and the list in it the same one.
let landmarks = 0;
function number(element, name) {
  landmarks += 1;
  element.removeAttribute("aria-labelledby");
  element.setAttribute("aria-label", `${name} (${landmarks})`);
}

document$.subscribe(() => {
  document.querySelector("[data-md-component=search]")?.setAttribute("aria-label", "Search");
  for (const menu of document.querySelectorAll("nav nav")) {
    const heading = document.getElementById(menu.getAttribute("aria-labelledby"));
    number(menu, heading?.textContent.trim() || menu.getAttribute("aria-label"));
  }
  document.querySelectorAll(".md-code__nav").forEach((buttons) => number(buttons, "Code"));
  // The theme wraps each table in a container that scrolls sideways on a phone.
  for (const container of document.querySelectorAll(".md-typeset__scrollwrap")) {
    container.tabIndex = 0;
    container.setAttribute("role", "region");
    number(container, "Table");
  }
});

// Code blocks get their buttons when they come into view.
new MutationObserver((changes) => {
  for (const { addedNodes } of changes) {
    for (const node of addedNodes) {
      if (node.matches?.(".md-code__nav")) number(node, "Code");
    }
  }
}).observe(document.body, { childList: true, subtree: true });
