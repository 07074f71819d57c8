"""How the page of a report looks: light and dark, on wide screens and narrow ones."""

STYLE = """
:root{color-scheme:light dark;--page:#fff;--card:#f6f8fa;--line:#d8dee4;--ink:#1f2328;--soft:#59636e;--blue:11 92 173}
@media(prefers-color-scheme:dark){:root{--page:#0d1117;--card:#161b22;--line:#30363d;--ink:#e6edf3;--soft:#9ba5b0;
--blue:72 148 240}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:70rem;margin:0 auto;padding:2rem 1rem 3rem}
h1{font-size:clamp(1.3rem,6vw,1.75rem);line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:2rem 0 .5rem}
p{margin:.4rem 0;overflow-wrap:anywhere}
header p,main>p,figcaption,.tile p{color:var(--soft);font-size:.875rem}
.kicker{text-transform:uppercase;letter-spacing:.08em;font-size:.75rem;margin:0}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);gap:.75rem;margin:1.25rem 0}
@media(max-width:50rem){.tiles{grid-template-columns:repeat(2,1fr)}}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem 1rem;min-width:0}
.tile h2{font-size:.75rem;text-transform:uppercase;letter-spacing:.08em;color:var(--soft);margin:0}
.tile b{display:block;font-size:clamp(1.05rem,4.4vw,1.7rem);line-height:1.35;color:var(--ink);}
.box{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.8125rem;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .6rem;text-align:right;font-weight:normal;white-space:nowrap;border-bottom:1px solid var(--line)}
tr:first-child th{vertical-align:bottom;color:var(--soft);white-space:normal}
th:first-child{text-align:left;white-space:normal;min-width:6rem}
.total th,.total td{font-weight:600;border:0}
.map{width:100%;table-layout:fixed}
.map td,.map th{padding:.12rem .5rem;border:1px solid var(--page);text-align:center}
.map th{overflow-wrap:anywhere}
.map th:first-child{position:sticky;left:0;background:var(--page);text-align:right;color:var(--soft);
width:5rem;min-width:0}
.kept{background:rgb(var(--blue)/calc(.04 + .58*var(--kept)))}
.dense{background:var(--card);color:var(--soft);outline:1px solid var(--line);outline-offset:-2px}
.legend span{display:inline-block;padding:0 .6rem;color:var(--ink)}
details{border:1px solid var(--line);border-radius:.6rem;margin:.6rem 0;padding:0 1rem}
summary{cursor:pointer;padding:.6rem 0;font-weight:600}
details .box{margin-bottom:1rem}
figure{margin:0 0 1rem}
img{max-width:100%;height:auto;background:#fff;border-radius:.4rem}
@media(max-width:50rem){figure{overflow-x:auto}figure img{max-width:none;width:45rem}}
"""
