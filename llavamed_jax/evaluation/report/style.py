"""The look of `report.html`: one style sheet, no fonts or pictures from elsewhere."""

CSS = """
:root{--ink:#1c2733;--soft:#5d6b7a;--line:#dfe5eb;--paper:#fff;--back:#f5f7f9}
:root{--good:#1c7a4a;--goodback:#e6f4ec;--bad:#a8322b;--badback:#fbeae8;--half:#8a6100;--halfback:#fdf3d9}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink)}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1120px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:18px;margin:40px 0 4px}
h3{font-size:15px;margin:20px 0 0}
p{margin:4px 0 12px}
.soft,.note{color:var(--soft)}
.soft,td code{overflow-wrap:anywhere}
.note{font-size:13px;max-width:100ch}
.notice{display:inline-block;margin:12px 0 0;padding:6px 12px;border-left:3px solid var(--bad);background:var(--badback);font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:14px;margin:24px 0 0}
.card{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:14px 16px}
.card b{display:block;font-size:28px;line-height:1.2;font-variant-numeric:tabular-nums}
.card span{font-size:13px;color:var(--soft);display:block}
.scroll{overflow-x:auto;background:var(--paper);border:1px solid var(--line);border-radius:8px;margin:8px 0}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:7px 12px;text-align:left;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;background:#eef2f5;font-weight:600;white-space:nowrap}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tbody th{font-weight:500;white-space:nowrap}
.ci{color:var(--soft);font-size:12.5px;white-space:nowrap}
svg.bar{display:block;margin-top:4px}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(330px,1fr));gap:16px;margin-top:12px;align-items:start}
figure{margin:0;background:var(--paper);border:1px solid var(--line);border-radius:8px;overflow:hidden}
figure .picture{background:#0c1014;height:250px;display:flex;align-items:center;justify-content:center;color:#aab4be}
figure img{max-width:100%;max-height:250px;display:block}
figcaption{padding:10px 14px 12px;font-size:13.5px}
figcaption .name{color:var(--soft);font-size:12.5px}
.qa{border-top:1px solid var(--line);margin-top:9px;padding-top:9px}
.qa .q{font-weight:600}
.qa div{overflow-wrap:anywhere}
.qa .q,.qa .line span{white-space:pre-line}
.tag{float:right;margin-left:8px;padding:0 8px;border-radius:10px;font-size:12px;font-weight:600}
.right{color:var(--good);background:var(--goodback)}
.wrong{color:var(--bad);background:var(--badback)}
.partly{color:var(--half);background:var(--halfback)}
.qa .line{display:grid;grid-template-columns:80px 1fr}
.k{color:var(--soft)}
details{overflow-x:auto;background:var(--paper);border:1px solid var(--line);border-radius:8px;margin:8px 0;padding:10px 14px}
details th{width:200px}
summary{cursor:pointer;font-weight:600}
td code{font:12.5px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
@media(max-width:640px){main{padding:20px 12px 40px}th,td{padding:6px 8px}}
@media(max-width:640px){thead th,tbody th{white-space:normal}td:not(.n){min-width:110px}details th{width:110px}}
@media print{body{background:#fff}figure,.card{break-inside:avoid}}
"""
