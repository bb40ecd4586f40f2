// A question as a program: the same request, for a shell and for the stock client. Keys stay in the environment.
import { address } from "./api.js";
import { html, useState } from "./html.js";
import { bodyOf } from "./question.js";

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

function python(value, indent = "    ") {
  if (Array.isArray(value)) return `[${value.map((one) => python(one, indent)).join(", ")}]`;
  if (value && typeof value === "object") {
    return `{${Object.entries(value).map(([name, one]) => `${JSON.stringify(name)}: ${python(one, indent)}`).join(", ")}}`;
  }
  return value === true ? "True" : value === false ? "False" : value === null ? "None" : JSON.stringify(value);
}

export function curl(body) {
  return `curl ${address("v1/chat/completions")} \\
  -H "Authorization: Bearer $F2L_KEY" -H "Content-Type: application/json" \\
  -d ${shell(JSON.stringify(body))}`;
}

export function client(body) {
  const { model, messages, f2l, ...options } = body;
  const extra = f2l ? `,\n    extra_body=${python({ f2l })}` : "";
  const rest = Object.entries(options).map(([name, value]) => `${name}=${python(value)}`).join(", ");
  return `import os
from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(address("v1"))}, api_key=os.environ.get("F2L_KEY", "none"))
answer = client.chat.completions.create(
    model=${python(model)},
    messages=${python(messages)},
    ${rest}${extra},
)
print(answer.choices[0].message.content)`;
}

export function Snippets({ one, mode }) {
  const body = bodyOf(one.text, one.files, one.spans, mode);
  return html`<details class="snippets">
    <summary>As code</summary>
    <${Code} name="curl" text=${curl(body)} />
    <${Code} name="Python" text=${client(body)} />
  </details>`;
}

export function Code({ name, text, label = `The question for ${name}` }) {
  const [copied, setCopied] = useState(false);
  const copy = async () => {
    await write(text);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  return html`<figure>
    <figcaption>${name} <button type="button" class="small" onClick=${copy}>${copied ? "Copied" : `Copy ${name}`}</button></figcaption>
    <pre tabindex="0" role="group" aria-label=${label}>${text}</pre>
  </figure>`;
}

// Browsers have a clipboard for pages over https and on this machine alone; elsewhere a selection does it.
async function write(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
