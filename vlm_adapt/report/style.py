"""The looks and the small script of the report: plain strings, put into the page as they are.

Knows nothing about runs. The script filters samples and shows a curve's values under the pointer; without it
the page shows everything.
"""

CSS = """
:root{--page:#f6f7f9;--card:#fff;--text:#1b2130;--soft:#586174;--rule:#e1e4ea;--grid:#eceef2;
--c0:#8b94a5;--c1:#2456c7;--c2:#b4540a;--c3:#0b7a75;--c4:#7a3fb5;--c5:#a3225f;--c6:#5d7012;--c7:#7b5b43;
--right:#17704a;--right-soft:#e3f3ea;--wrong:#b02a25;--wrong-soft:#fbe7e5;--partly:#8a5a00;--partly-soft:#fbf0d9}
@media (prefers-color-scheme:dark){:root{--page:#11141a;--card:#191d25;--text:#e6e9ef;--soft:#9aa4b5;
--rule:#2b313c;--grid:#262b35;--c0:#77818f;--c1:#82a8ff;--c2:#f0a35c;--c3:#4fc4bb;--c4:#c69bf2;--c5:#f28ab8;--c6:#b3c75c;--c7:#c9a58a;
--right:#66cf9b;--right-soft:#15301f;--wrong:#ff9189;--wrong-soft:#3a1c1b;--partly:#e9bd5e;--partly-soft:#33270c}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:0 auto;padding:40px 24px 72px}
h1{font-size:30px;line-height:1.2;margin:2px 0 16px;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 14px;letter-spacing:-.01em}
small{color:var(--soft);font-size:12.5px;font-weight:400}
.over{margin:0;color:var(--soft);font-size:13px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:6px 28px;margin:0 0 24px}
.facts div{display:flex;gap:10px;min-width:0}
.facts dt{color:var(--soft);flex:0 0 76px}
.facts dd{margin:0;min-width:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px}
.tile,figure,.table,.card{background:var(--card);border:1px solid var(--rule);border-radius:10px}
.tile{padding:14px 16px;display:flex;flex-direction:column}
.tile span{color:var(--soft);font-size:13px}
.tile strong{font-size:25px;line-height:1.25;font-weight:600;letter-spacing:-.02em;white-space:nowrap}
.notes{margin-top:16px;border-left:3px solid var(--partly);background:var(--partly-soft);
border-radius:0 8px 8px 0;
padding:10px 16px;font-size:14px}
.notes ul{margin:0;padding-left:16px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(320px,100%),1fr));gap:12px}
figure{margin:0;padding:14px 16px 10px;min-width:0}
figure.wide{grid-column:1/-1}
figcaption{font-weight:600;font-size:14px;margin-bottom:10px;display:flex;flex-wrap:wrap;gap:2px 12px;
align-items:baseline}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin-left:auto}
.key{font-weight:400;font-size:12.5px;color:var(--soft);display:inline-flex;align-items:center;gap:6px}
.key::before{content:"";width:14px;height:3px;border-radius:2px;background:currentColor;
color:var(--c,var(--c1))}
.key.faint::before{opacity:.4}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}
.plot{display:grid;grid-template-columns:auto 1fr;grid-template-rows:150px 22px;column-gap:8px}
.wide .plot{grid-template-rows:270px 22px}
.y{position:relative;width:58px;font-size:12px;color:var(--soft)}
.y span{position:absolute;right:0;transform:translateY(-50%);white-space:nowrap}
.x{grid-column:2;position:relative;font-size:12px;color:var(--soft);margin-right:14px}
.x span{position:absolute;top:4px;transform:translateX(-50%);white-space:nowrap}
.area{position:relative;min-width:0;margin-right:14px}
.area svg{position:absolute;inset:0;width:100%;height:100%;overflow:visible}
.area path{fill:none;vector-effect:non-scaling-stroke}
.grid{stroke:var(--grid);stroke-width:1}
.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 4}
.mark-name{position:absolute;top:0;margin-left:6px;font-size:12px;color:var(--soft);background:var(--card);
padding:0 3px;max-width:9em;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.line{stroke:var(--c);stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}
.area .band{fill:var(--c);stroke:var(--card);stroke-width:1.5;stroke-linejoin:round}
.line.faint{stroke-width:1;opacity:.33}
.dot{stroke:var(--c);stroke-width:6;stroke-linecap:round}
.cursor{position:absolute;top:0;bottom:0;border-left:1px solid var(--soft);pointer-events:none;z-index:2}
.cursor span{position:absolute;top:6px;left:8px;background:var(--card);border:1px solid var(--rule);
border-radius:6px;padding:4px 8px;font-size:12px;white-space:pre;box-shadow:0 2px 8px #0002}
.cursor.flip span{left:auto;right:8px}
.bars{padding-bottom:14px;margin-bottom:12px}
.bar{display:grid;grid-template-columns:170px 1fr 92px;gap:4px 14px;align-items:center;padding:7px 0;
border-top:1px solid var(--grid)}
.bar:first-of-type{border-top:0}
.label{font-weight:500;overflow-wrap:anywhere;line-height:1.3}
.label small{display:block}
.track{display:flex;align-items:center;gap:8px;font-size:13px;padding-right:60px}
.track i{height:14px;min-width:2px;border-radius:0 4px 4px 0;background:var(--c1);flex:none}
.track.blind i{height:8px;background:var(--c0)}
.track b{font-weight:600;white-space:nowrap}
.track.blind b{font-weight:400;color:var(--soft);font-size:12.5px}
.gain{color:var(--soft);font-size:13px;text-align:right;white-space:nowrap}
.table{overflow-x:auto;margin-bottom:12px}
table{border-collapse:collapse;width:100%}
th,td{text-align:right;padding:8px 16px;border-top:1px solid var(--grid);white-space:nowrap}
thead th{border-top:0;color:var(--soft);font-weight:500;font-size:13px}
th:first-child{text-align:left}
tbody th{font-weight:500}
td.why{white-space:normal;color:var(--soft);font-size:13.5px}
td.text,th.text{text-align:left;white-space:normal;overflow-wrap:anywhere}
td.text small{display:block}
.why-refused td,.why-refused th{vertical-align:top}
.why-refused :is(td,th):nth-child(n+4){text-align:left}
.why-refused td.text{min-width:7em}.why-refused td.text:last-child{min-width:15em}
td small{margin-left:4px}td.text small{margin-left:0}
tr.total>*{border-top:1px solid var(--soft);font-weight:600}
.lead{color:var(--soft);margin:-6px 0 14px}
.lead.above{margin:18px 0 10px}
.lead a{color:var(--c1)}
.filters{position:sticky;top:0;z-index:3;background:var(--page);padding:10px 0;display:flex;flex-wrap:wrap;
gap:10px 18px;align-items:center;font-size:14px}
.buttons{display:inline-flex;flex-wrap:wrap;gap:6px}
button,select{font:inherit;color:inherit;background:var(--card);border:1px solid var(--rule);
border-radius:8px;
padding:5px 12px;cursor:pointer;min-height:34px}
button b{font-weight:400;color:var(--soft);margin-left:3px}
button[aria-pressed=true]{background:var(--text);border-color:var(--text);color:var(--page)}
button[aria-pressed=true] b{color:inherit;opacity:.75}
button:focus-visible,select:focus-visible{outline:2px solid var(--c1);outline-offset:2px}
label{color:var(--soft);display:inline-flex;gap:8px;align-items:center}
select{color:var(--text)}
#shown{color:var(--soft);margin-left:auto}
.grid-of-cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(240px,100%),1fr));gap:14px;
margin-top:6px}
.card{overflow:hidden;display:flex;flex-direction:column;min-width:0}
.card[hidden]{display:none}
.frame{position:relative;aspect-ratio:4/3;background:var(--grid);display:grid;place-items:center}
.frame img{position:absolute;inset:0;width:100%;height:100%;object-fit:contain}
.no-image{color:var(--soft);font-size:13px}
.badge{position:absolute;top:8px;left:8px;padding:1px 9px;border-radius:99px;font-size:12px;font-weight:600;
background:var(--card);color:var(--soft)}
.wrong .badge{background:var(--wrong-soft);color:var(--wrong)}
.right .badge{background:var(--right-soft);color:var(--right)}
.partly .badge{background:var(--partly-soft);color:var(--partly)}
.body{padding:12px 14px;display:flex;flex-direction:column;flex:1}
h3{font-size:14.5px;line-height:1.35;margin:0 0 8px;font-weight:600;overflow-wrap:anywhere}
.body dl{display:grid;grid-template-columns:auto 1fr;gap:2px 12px;margin:0 0 10px;font-size:14px;
line-height:1.4}
.body dt{color:var(--soft)}
.body dd{margin:0;overflow-wrap:anywhere}
.body dd span{display:block}.body dd span+span{margin-top:3px}
.body dd.answer{font-weight:600}
.wrong dd.answer{color:var(--wrong)}.right dd.answer{color:var(--right)}.partly dd.answer{color:var(--partly)}
.body dd.blind,.body i{color:var(--soft)}
.key-line{margin:auto 0 0;display:flex;justify-content:space-between;gap:12px;color:var(--soft);
font-size:12px}
.key-line span{overflow-wrap:anywhere}
@media (max-width:640px){main{padding:24px 14px 48px}h1{font-size:24px}
.tiles{grid-template-columns:1fr 1fr;gap:8px}.tile{padding:11px 13px}.tile strong{font-size:21px}
.facts{grid-template-columns:1fr;gap:4px}.bar{grid-template-columns:1fr auto}.bar .label{grid-column:1}
.bar .gain{grid-column:2;grid-row:1}.bar>div:nth-child(2){grid-column:1/-1}.label small{display:inline}
.wide .plot{grid-template-rows:200px 22px}.legend{margin-left:0;width:100%}th,td{padding:7px 8px;
font-size:13px}
figure{padding:12px 12px 8px}.filters{position:static}}
@media print{body{background:#fff}.filters{display:none}.card,figure{break-inside:avoid}}
"""

SCRIPT = """
(() => {
  const cards = [...document.querySelectorAll('.card')];
  const buttons = [...document.querySelectorAll('[data-show]')];
  const kind = document.getElementById('kind');
  const shown = document.getElementById('shown');
  const nothing = document.getElementById('nothing');
  let state = '';
  const refresh = () => {
    let visible = 0;
    for (const card of cards) {
      const fits = (!state || card.dataset.state === state)
        && (!kind || !kind.value || card.dataset.kind === kind.value);
      card.hidden = !fits;
      visible += fits;
    }
    if (shown) shown.textContent = visible + ' shown';
    if (nothing) nothing.hidden = visible > 0;
  };
  for (const button of buttons) button.addEventListener('click', () => {
    state = button.dataset.show;
    for (const other of buttons) other.setAttribute('aria-pressed', other === button);
    refresh();
  });
  if (kind) kind.addEventListener('change', refresh);
  if (cards.length) refresh();

  for (const figure of document.querySelectorAll('[data-lines]')) {
    const lines = JSON.parse(figure.dataset.lines);
    const area = figure.querySelector('.area'), cursor = figure.querySelector('.cursor');
    const label = cursor.appendChild(document.createElement('span'));
    area.addEventListener('pointermove', (event) => {
      const box = area.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
      const closer = (a, b) => Math.abs(b[1] - at) < Math.abs(a[1] - at) ? b : a;
      const near = lines.map((line) => [line, line.points.reduce(closer)]);
      const x = near[0][1];
      cursor.hidden = false;
      cursor.style.left = 100 * x[1] + '%';
      cursor.classList.toggle('flip', x[1] > .6);
      const name = (line) => lines.length > 1 ? line.name + ' ' : '';
      label.textContent = ['step ' + x[0], ...near.map(([line, p]) => name(line) + p[3])].join('\\n');
    });
    area.addEventListener('pointerleave', () => { cursor.hidden = true; });
  }
})();
"""
