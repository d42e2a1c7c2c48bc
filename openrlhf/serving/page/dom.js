/* Elements and words for the page's other files. Data becomes text nodes and attributes, never HTML. */

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

export const count = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/* Where a passage stands, beside its title: the id where that says more, and the page. */
export function place(item) {
  const id = item.title && item.title !== item.id ? item.id : "";
  return [id, Number.isInteger(item.page) ? `page ${item.page}` : ""].filter(Boolean);
}

/* Says something to who listens to the page. */
export function announce(text) { $("announce").textContent = text; }
