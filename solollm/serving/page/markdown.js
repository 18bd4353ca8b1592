// Markdown to DOM nodes. A model's text enters the page through text nodes alone, so that nothing in
// it can become markup, style or script. All patterns are bounded: a text made to slow them cannot.

const MAX_DEPTH = 6;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,30}).{0,200}$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*)$/;
const RULE = /^ {0,3}(?:(?:-\s*){3,}|(?:\*\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^( {0,12})([-*+]|\d{1,9}[.)])(?: +|$)(.*)$/;
const QUOTE = /^ {0,3}> ?/;
const TABLE_LINE = /^[\s|:-]{3,400}$/;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

/** The nodes of a Markdown text. */
function renderMarkdown(text, depth = 0) {
  const lines = text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n");
  const nodes = document.createDocumentFragment();
  for (let at = 0; at < lines.length; ) {
    const [node, next] = block(lines, at, depth);
    if (node) nodes.append(node);
    at = next;
  }
  return nodes;
}

/** [node or null, the line after it] of the block that begins at a line. */
function block(lines, at, depth) {
  const line = lines[at];
  if (!line.trim()) return [null, at + 1];
  const fence = FENCE.exec(line);
  if (fence) return fencedCode(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const node = element(`h${heading[1].length}`);
    node.append(inline(heading[2].replace(/\s+#+\s*$/, "")));
    return [node, at + 1];
  }
  if (line.length < 400 && RULE.test(line)) return [element("hr"), at + 1];
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quotation(lines, at, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at, depth);
}

function fencedCode(lines, at, fence) {
  let end = at + 1;
  const close = (line) => {
    const trimmed = line.trim();
    return trimmed.length >= fence[1].length && trimmed === fence[1][0].repeat(trimmed.length);
  };
  while (end < lines.length && !close(lines[end])) end++;
  const indent = /^ {0,3}/.exec(lines[at])[0].length;
  const strip = (line) => line.slice(Math.min(indent, line.length - line.trimStart().length));
  return [codeBlock(lines.slice(at + 1, end).map(strip).join("\n"), fence[2]), end + 1];
}

function codeBlock(source, language) {
  const copy = element("button", "copy-code", "Copy");
  copy.type = "button";
  copy.setAttribute("aria-label", "Copy the code");
  const code = element("code");
  code.append(highlighted(source, language.toLowerCase()));
  const scroll = element("pre", "", code);
  scroll.tabIndex = 0;
  return element("div", "code", element("div", "code-head", element("span", "", language || "text"), copy), scroll);
}

function quotation(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n");
  return [element("blockquote", "", renderMarkdown(inner, depth + 1)), end];
}

function list(lines, at, depth) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(marker);
  const node = element(isOrdered ? "ol" : "ul");
  if (isOrdered) node.start = parseInt(marker, 10);
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length !== indent.length || /\d/.test(item[2]) !== isOrdered) break;
    const content = [item[3]];
    for (at++; at < lines.length && belongs(lines, at, indent.length); at++) content.push(lines[at]);
    node.append(listItem(content, depth));
  }
  return [node, at];
}

/** Whether a line goes on with the item of a list that is indented by so much. */
function belongs(lines, at, indent) {
  const line = lines[at];
  if (!line.trim()) {
    const next = lines[at + 1];
    return next !== undefined && next.trim() !== "" && next.search(/\S/) > indent;
  }
  if (line.search(/\S/) > indent) return true;
  return lines[at - 1].trim() !== "" && !ITEM.test(line) && !FENCE.test(line) && !HEADING.test(line);
}

function listItem(content, depth) {
  const rest = content.slice(1);
  const indents = rest.filter((line) => line.trim()).map((line) => line.search(/\S/));
  const cut = Math.min(...indents, 12);
  const body = [content[0], ...rest.map((line) => line.slice(Math.min(cut, Math.max(line.search(/\S/), 0))))];
  const rendered = renderMarkdown(body.join("\n"), depth + 1);
  const first = rendered.firstChild;
  if (first?.nodeName === "P") first.replaceWith(...first.childNodes); // tight, as most lists are
  return element("li", "", rendered);
}

function isTable(lines, at) {
  const next = lines[at + 1];
  return lines[at].includes("|") && next !== undefined && TABLE_LINE.test(next) && next.includes("-") && next.includes("|");
}

function table(lines, at) {
  const sides = cells(lines[at + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (line, name) =>
    element("tr", "", ...cells(line).map((cell, place) => element(name, sides[place] ?? "", inline(cell))));
  const body = element("tbody");
  const head = element("thead", "", row(lines[at], "th"));
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.append(row(lines[at], "td"));
  return [element("div", "scroll", element("table", "", head, body)), at];
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return bare.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  const ends = (line) =>
    !line.trim() || FENCE.test(line) || HEADING.test(line) || (depth < MAX_DEPTH && (QUOTE.test(line) || ITEM.test(line)));
  while (end < lines.length && !ends(lines[end])) end++;
  return [element("p", "", inline(lines.slice(at, end).join("\n"))), end];
}

const INLINE = new RegExp(
  [
    /\\([\\`*_{}[\]()#+.!|~>-])/, // 1 escaped
    /(`{1,3})(?!`)([^\n]{1,600}?)(?<!`)\2(?!`)/, // 2, 3 code
    /\*\*(?=\S)([^\n]{1,600}?\S)\*\*(?!\*)/, // 4 strong
    /(?<!\w)__(?=\S)([^\n]{1,600}?\S)__(?!\w)/, // 5 strong
    /\*(?=[^\s*])([^*\n]{1,600})\*(?!\*)/, // 6 emphasis
    /(?<!\w)_(?=[^\s_])([^_\n]{1,600})_(?!\w)/, // 7 emphasis
    /~~(?=\S)([^~\n]{1,600})~~/, // 8 struck
    /\[([^[\]\n]{1,400})\]\(\s{0,3}<?([^\s()<>]{1,1000}(?:\([^\s()<>]{0,200}\))?)>?\s{0,3}(?:"[^"\n]{0,200}")?\)/, // 9, 10 link
    /(https?:\/\/[^\s<>"'`]{1,1000}[^\s<>"'`.,;:!?)\]*_~])/, // 11 address
  ].map((pattern) => pattern.source).join("|"),
  "g",
);

/** The nodes of a line's text. */
function inline(text, depth = 0) {
  const nodes = document.createDocumentFragment();
  let at = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.append(text.slice(at, found.index), inlineNode(found, depth + 1));
    at = found.index + found[0].length;
  }
  nodes.append(text.slice(at));
  return nodes;
}

function inlineNode(found, depth) {
  const inner = (text) => (depth < MAX_DEPTH ? inline(text, depth) : text);
  if (found[1]) return found[1];
  if (found[3]) return element("code", "", found[3].length > 2 ? found[3].replace(/^ (.*) $/, "$1") : found[3]);
  if (found[4] || found[5]) return element("strong", "", inner(found[4] ?? found[5]));
  if (found[6] || found[7]) return element("em", "", inner(found[6] ?? found[7]));
  if (found[8]) return element("del", "", inner(found[8]));
  return link(found[10] ?? found[11], found[9] ? inner(found[9]) : found[11], found[0]);
}

/** A link that leaves nothing behind; the written text where it is no web or mail address. */
function link(address, content, written) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return written;
  const node = element("a", "", content);
  node.href = address;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  return node;
}

const KEYWORDS = new Set(
  ("and as assert async await break case catch class const continue def default del do elif else enum except export extends "
  + "false finally fn for from func function global go if impl import in interface is lambda let match mut new nil nonlocal not null None "
  + "or package pass pub raise return self static struct super switch this throw true True False try type use var void while with yield "
  + "int float str bool char double long string public private protected fi then done echo local end module require").split(" "),
);
const SQL_KEYWORDS = new Set("select from where insert into values update set delete create drop table view index join left inner on group order by having limit as and or not null in is like between distinct union case when then else end with".split(" "));
const HASH_COMMENTS = new Set(["", "py", "python", "sh", "bash", "shell", "zsh", "rb", "ruby", "yaml", "yml", "toml", "r", "make", "dockerfile", "perl"]);

/** Code with its words coloured: strings, comments, numbers and keywords, of any language. */
function highlighted(source, language) {
  const comment = HASH_COMMENTS.has(language) ? "#[^\\n]*" : "\\/\\/[^\\n]*|\\/\\*[^]*?(?:\\*\\/|$)" + (language === "sql" ? "|--[^\\n]*" : "");
  const tokens = new RegExp(
    `("""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\\\.|[^"\\\\\\n])*"?|'(?:\\\\.|[^'\\\\\\n])*'?)|(${comment})|\\b(\\d[\\w.]*)|([A-Za-z_]\\w*)`,
    "g",
  );
  const isKeyword = (word) => (language === "sql" ? SQL_KEYWORDS.has(word.toLowerCase()) : KEYWORDS.has(word));
  const nodes = document.createDocumentFragment();
  let at = 0;
  for (const found of source.matchAll(tokens)) {
    const kind = found[1] ? "s" : found[2] ? "c" : found[3] ? "n" : isKeyword(found[4]) ? "k" : "";
    if (!kind) continue;
    nodes.append(source.slice(at, found.index), element("span", kind, found[0]));
    at = found.index + found[0].length;
  }
  nodes.append(source.slice(at));
  return nodes;
}
