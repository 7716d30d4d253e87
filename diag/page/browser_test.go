package page

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/png"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/test/nstest"
)

var update = flag.Bool("update", false, "replace the pictures in Documentation/images")

const (
	images      = "../../Documentation/images"
	largestShot = 300_000
)

// picture takes a picture of the screen. It must show something; with -update it replaces the one in the documentation,
// if there is one.
func picture(t *testing.T, b *tab, name string) {
	t.Helper()
	raw := b.shot()
	img, err := png.Decode(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	colours := map[[3]uint32]bool{}
	for y := 0; y < img.Bounds().Dy(); y += 3 {
		for x := 0; x < img.Bounds().Dx(); x += 3 {
			r, g, b, _ := img.At(x, y).RGBA()
			colours[[3]uint32{r, g, b}] = true
		}
	}
	if len(colours) < 20 {
		t.Errorf("%s shows only %d colours", name, len(colours))
	}
	if _, err := os.Stat(filepath.Join(images, name)); *update && err == nil {
		if err := os.WriteFile(filepath.Join(images, name), small(t, img), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func distance(a, b color.RGBA) int {
	d := func(x, y uint8) int { return max(int(x), int(y)) - min(int(x), int(y)) }
	return d(a.R, b.R) + d(a.G, b.G) + d(a.B, b.B)
}

// small is the picture with at most 256 colours, in less than half of the bytes.
func small(t *testing.T, img image.Image) []byte {
	t.Helper()
	counts, bounds := map[color.RGBA]int{}, img.Bounds()
	at := func(x, y int) color.RGBA { return color.RGBAModel.Convert(img.At(x, y)).(color.RGBA) }
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			counts[at(x, y)]++
		}
	}
	common := slices.SortedFunc(maps.Keys(counts), func(a, b color.RGBA) int {
		return cmp.Or(counts[b]-counts[a], cmp.Compare(a.R, b.R), cmp.Compare(a.G, b.G), cmp.Compare(a.B, b.B))
	})
	var palette color.Palette
	for _, c := range common { // a colour that is almost there already would take the place of a rare one
		if len(palette) < 256 && (len(palette) == 0 || distance(c, palette[palette.Index(c)].(color.RGBA)) > 14) {
			palette = append(palette, c)
		}
	}
	index := map[color.RGBA]uint8{}
	for c := range counts {
		index[c] = uint8(palette.Index(c))
	}
	out := image.NewPaletted(bounds, palette)
	for y := bounds.Min.Y; y < bounds.Max.Y; y++ {
		for x := bounds.Min.X; x < bounds.Max.X; x++ {
			out.SetColorIndex(x, y, index[at(x, y)])
		}
	}
	var b bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&b, out); err != nil || b.Len() > largestShot {
		t.Errorf("%v, %d bytes", err, b.Len())
	}
	return b.Bytes()
}

func serve(t *testing.T, s Source) string {
	t.Helper()
	srv := httptest.NewServer(newHandler(s, then))
	t.Cleanup(srv.Close)
	return srv.URL + "/"
}

const cellCount = `document.querySelectorAll("#grid [role=gridcell]").length`

// cellsAre waits for a number of tiles, in a grid that has its roles right and exactly one tile in the tab order.
func cellsAre(b *tab, n int) {
	b.t.Helper()
	b.until(fmt.Sprintf("%s === %d", cellCount, n))
	if n == 0 {
		return
	}
	b.until(`document.querySelectorAll("#grid[role=grid] > [role=row] > [role=gridcell][tabindex='0']").length === 1`)
	if got := eval[int](
		b,
		`[...document.querySelectorAll("#grid [role=gridcell]")].filter((c) => !c.getAttribute("aria-label")).length`,
	); got > 0 {
		b.t.Errorf("%d tiles have no label", got)
	}
}

func TestInABrowser(t *testing.T) {
	c := startChrome(t)
	t.Run("three peers, light", func(t *testing.T) { testThree(t, c) })
	t.Run("a hundred peers, dark", func(t *testing.T) { testHundred(t, c) })
	t.Run("five thousand peers", func(t *testing.T) { testThousands(t, c) })
	t.Run("without JavaScript", func(t *testing.T) { testNoScript(t, c) })
	t.Run("on a phone", func(t *testing.T) { testPhone(t, c) })
	t.Run("filter", func(t *testing.T) { testFilter(t, c) })
	t.Run("keyboard", func(t *testing.T) { testKeyboard(t, c) })
	t.Run("live", func(t *testing.T) { testLive(t, c) })
	t.Run("daemon gone", func(t *testing.T) { testGone(t, c) })
	t.Run("loop stuck", func(t *testing.T) { testStuck(t, c) })
	t.Run("hidden", func(t *testing.T) { testHidden(t, c) })
	t.Run("hostile names", func(t *testing.T) { testHostile(t, c) })
	t.Run("no peers", func(t *testing.T) { testNone(t, c) })
	t.Run("status in a terminal", func(t *testing.T) { testTerminal(t, c) })
}

func testThree(t *testing.T, c *chrome) {
	f := network(3)
	b := c.open(t, screen{width: 1280, height: 860}, serve(t, f))
	cellsAre(b, 3)
	b.until(`getComputedStyle(document.body).backgroundColor === "rgb(246, 247, 248)"`)
	if title := eval[string](b, "document.title"); title != "Ready: worker-0000.example.net - overlayd" {
		t.Errorf("title %q", title)
	}
	picture(t, b, "page-3.png")
}

func testHundred(t *testing.T, c *chrome) {
	f := network(100)
	fail(&f.node)
	b := c.open(t, screen{width: 1280, height: 1180, dark: true}, serve(t, f))
	cellsAre(b, 100)
	b.until(`getComputedStyle(document.body).backgroundColor === "rgb(17, 20, 23)"`)
	b.until(
		`document.querySelector("#state").classList.contains("not-ready") && document.querySelectorAll("#problems li").length === 2`,
	)
	b.click(`[aria-label^="worker-0021"]`)
	b.until(
		`!document.getElementById("details").hidden && document.getElementById("details").innerText.includes("full-size ones are lost")`,
	)
	b.until(`document.querySelectorAll("[aria-selected=true]").length === 1`)
	b.press("Escape")
	b.until(`document.getElementById("details").hidden`)
	b.click(`[aria-label^="worker-0021"]`)
	eval[any](b, "scrollTo(0, 0)")
	b.until(`!document.getElementById("details").hidden && scrollY === 0 && document.getElementById("tip").hidden`)
	picture(t, b, "page-100-dark.png")
}

func testThousands(t *testing.T, c *chrome) {
	f := network(5000)
	url := serve(t, f)
	b := c.open(t, screen{width: 1440, height: 1180}, url)
	cellsAre(b, 5000)
	b.until(firstPaint)
	t.Logf(
		"first picture %.0f ms after the navigation; all tiles are there %.0f ms after the peers were received",
		eval[float64](b, firstPaint+".startTime"),
		firstRender(b),
	)
	t.Logf(
		"a filter that leaves a tenth: %.0f ms; laid out again: %.0f ms",
		timed(
			b,
			`{const f = document.getElementById("filter"); f.value = "worker-1"; document.querySelector(".chip").click()}`,
		),
		timed(b, `{const f = document.getElementById("filter"); f.value = ""; document.querySelector(".chip").click()}`),
	)
	cellsAre(b, 5000)
	if rows := eval[int](b, `document.querySelectorAll("#rows tr").length`); rows > 50 {
		t.Errorf("the list starts with %d lines", rows)
	}
	// The keyboard reaches the last tile, and the browser shows it.
	b.press("/")
	eval[any](b, `document.querySelector("#grid [tabindex='0']").focus()`)
	eval[any](
		b,
		`document.activeElement.dispatchEvent(new KeyboardEvent("keydown", {key: "End", ctrlKey: true, bubbles: true}))`,
	)
	b.until(`document.activeElement.getAttribute("aria-label").startsWith("worker-5000")`)
	b.until(
		`(() => { const r = document.activeElement.getBoundingClientRect(); return r.top >= 0 && r.bottom <= innerHeight; })()`,
	)
	eval[any](b, "document.activeElement.blur(), scrollTo(0, 0)")
	b.until("scrollY === 0")
	picture(t, b, "page-5000.png")
}

// These come a moment after what they tell of.
const (
	firstPaint  = `performance.getEntriesByName("first-contentful-paint")[0]`
	peersShown  = `performance.getEntriesByName("peers shown")[0]`
	peersLoaded = `performance.getEntriesByType("resource").find((r) => r.name.endsWith("peers.json"))`
)

// firstRender is how long the script worked from the peers' arrival until the first frame with them, in milliseconds.
func firstRender(b *tab) float64 {
	b.until(peersShown + " && " + peersLoaded)
	return eval[float64](b, peersShown+".startTime - "+peersLoaded+".responseEnd")
}

// timed is how long a statement takes, with the layout that follows, in milliseconds.
func timed(b *tab, statement string) float64 {
	return eval[float64](
		b,
		`(() => { const start = performance.now(); `+statement+`; document.getElementById("grid").getBoundingClientRect(); return performance.now() - start; })()`,
	)
}

func testNoScript(t *testing.T, c *chrome) {
	f := network(100)
	f.node.Problems = []status.Problem{
		{
			Name:   "unreachable",
			Reason: "10.64.30.0/24 of node worker-0031: behind the gateway 192.0.2.254",
			Since:  f.node.Now.Add(-5 * time.Minute),
		},
	}
	b := c.open(t, screen{width: 1280, height: 1000, noScript: true}, serve(t, f))
	b.until(`document.querySelectorAll("#all tbody tr").length === 100`)
	text := eval[string](b, "document.body.innerText")
	for _, p := range f.peers {
		if !strings.Contains(text, p.Name) {
			t.Errorf("%s is missing", p.Name)
		}
	}
	if !strings.Contains(text, "Degraded") || strings.Contains(text, "Filter") {
		t.Errorf("it says:\n%s", text)
	}
	picture(t, b, "page-nojs.png")
}

func testPhone(t *testing.T, c *chrome) {
	for _, n := range []int{3, 100, 5000} {
		f := network(n)
		fail(&f.node)
		b := c.open(t, screen{width: 360, height: 740, phone: true}, serve(t, f))
		cellsAre(b, n)
		narrow := `document.documentElement.scrollWidth <= 360`
		b.until(narrow)
		if n == 100 {
			picture(t, b, "page-phone.png")
		}
		b.click("#grid [role=gridcell]")
		b.until(`!document.getElementById("details").hidden && ` + narrow)
		b.until(
			`document.querySelector("#grid .picked").getBoundingClientRect().bottom < document.getElementById("details").getBoundingClientRect().top`,
		)
	}
	b := c.open(t, screen{width: 360, height: 740, phone: true, noScript: true}, serve(t, hostileNetwork()))
	b.until(`document.documentElement.scrollWidth <= 360`)
}

func filter(b *tab, text string) {
	eval[any](b, `document.getElementById("filter").select()`)
	b.write(text)
}

func testFilter(t *testing.T, c *chrome) {
	f := network(100)
	f.peers[7].Subnet = "fd00:10:244:5::/64"
	b := c.open(t, screen{width: 1280, height: 900}, serve(t, f))
	cellsAre(b, 100)
	b.press("/")
	b.until(`document.activeElement.id === "filter"`)
	for text, want := range map[string]struct {
		tiles int
		first string
	}{
		"worker-002": {10, "worker-0020"}, "WORKER-0021 example": {1, "worker-0021"}, "10.64.33.0": {1, "worker-0034"},
		"10.64.33.7":  {1, "worker-0034"},
		f.peers[4].ID: {1, "worker-0005"}, "192.0.2.55": {1, "worker-0055"}, "no such": {},
		"fd00:10:244:5::a:1": {1, "worker-0008"}, "fd00:10:244:6::1": {},
	} {
		filter(b, text)
		cellsAre(b, want.tiles)
		if want.tiles > 0 {
			b.until(
				fmt.Sprintf(
					`document.querySelector("#grid [role=gridcell]").getAttribute("aria-label").startsWith(%q)`,
					want.first,
				),
			)
		}
		b.press("Escape") // all again, which the next one has to change
		cellsAre(b, 100)
	}
	b.click(`.chip[data-state=silent]`)
	quiet := f.node.Probe.Silent
	cellsAre(b, quiet)
	b.until(`document.querySelector(".chip[data-state=silent]").getAttribute("aria-pressed") === "true"`)
	b.until(fmt.Sprintf(`document.getElementById("shown").textContent === "%d of 100"`, quiet))
	b.click(`.chip[data-state=lossy]`)
	cellsAre(b, quiet+f.node.Probe.Lossy)
	b.until(fmt.Sprintf(`document.querySelector(".chip[data-state=lossy] b").textContent === "%d"`, f.node.Probe.Lossy))
	b.until(fmt.Sprintf(`document.querySelectorAll("#rows tr").length === %d`, quiet+f.node.Probe.Lossy))
}

func testKeyboard(t *testing.T, c *chrome) {
	b := c.open(t, screen{width: 1280, height: 900}, serve(t, network(100)))
	cellsAre(b, 100)
	on := func(n int) {
		t.Helper()
		b.until(fmt.Sprintf(`(document.activeElement.getAttribute("aria-label") || "").startsWith("worker-%04d")`, n))
		b.until(`document.querySelectorAll("#grid [tabindex='0']").length === 1 && document.activeElement.tabIndex === 0`)
	}
	columns := eval[int](b, `+document.getElementById("grid").getAttribute("aria-colcount")`)
	// Tab goes from the filter over the legend into the grid, and out of it with one more.
	b.press("/")
	for range 9 {
		b.press("Tab")
	}
	on(1)
	b.until(`getComputedStyle(document.activeElement).outlineStyle === "solid"`)
	b.press("ArrowRight", "ArrowRight")
	on(3)
	b.press("ArrowDown")
	on(3 + columns)
	b.press("End")
	on(2 * columns)
	b.press("Home")
	on(1 + columns)
	b.press("ArrowUp", "ArrowUp", "ArrowLeft")
	on(1)
	b.press("ArrowRight", "Enter")
	b.until(
		`!document.getElementById("details").hidden && document.activeElement.id === "details-name" && document.activeElement.textContent.startsWith("worker-0002")`,
	)
	b.press("Escape")
	b.until(`document.getElementById("details").hidden`)
	on(2)
	b.press("Tab")
	b.until(`!document.getElementById("grid").contains(document.activeElement)`)
}

func testLive(t *testing.T, c *chrome) {
	f := network(100)
	b := c.open(t, screen{width: 1280, height: 900}, serve(t, f))
	cellsAre(b, 100)
	b.click(`[aria-label^="worker-0001"]`)
	b.until(`document.getElementById("details-state").textContent.startsWith("answers")`)
	eval[any](b, `window.kept = document.querySelector('[aria-label^="worker-0001"]'), window.kept.focus()`)
	f.change(func(f *fake) {
		f.peers[0].Probe = &status.PeerProbe{
			Verdict: status.Silent,
			Small:   status.Pings{Sent: 8, Lost: 8},
			Full:    status.Pings{Sent: 8, Lost: 8},
		}
		f.peers = f.peers[:99]
		fail(&f.node)
	})
	cellsAre(b, 99)
	b.until(
		`window.kept.isConnected && window.kept.classList.contains("is-silent") && document.activeElement === window.kept`,
	)
	b.until(`document.getElementById("details-state").textContent === "silent"`)
	b.until(
		`document.getElementById("word").textContent === "Not ready" && document.title.startsWith("Not ready") && document.getElementById("said").textContent.includes("Not ready")`,
	)
	f.change(func(f *fake) { f.peers, f.node = nil, healthyNode(f.node.Now) })
	cellsAre(b, 0)
	b.until(
		`document.getElementById("word").textContent === "Ready" && document.getElementById("details").hidden && !document.getElementById("problems").children.length`,
	)
}

func testGone(t *testing.T, c *chrome) {
	// An address of its own: nobody takes the port while the daemon is gone.
	l, err := net.Listen("tcp", net.JoinHostPort(nstest.Loopback().String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	f := network(3)
	run := func(l net.Listener) *http.Server {
		srv := &http.Server{Handler: Handler(f), ReadHeaderTimeout: patience}
		go func() { _ = srv.Serve(l) }()
		t.Cleanup(func() { srv.Close() })
		return srv
	}
	first := run(l)
	b := c.open(t, screen{width: 1280, height: 860}, "http://"+l.Addr().String()+"/")
	cellsAre(b, 3)
	first.Close()
	b.until(
		`!document.getElementById("gone").hidden && document.getElementById("gone-text").textContent.startsWith("No answer from the daemon") && document.body.classList.contains("old")`,
	)
	b.until(`/Showing the state of \d+:\d\d:\d\d\./.test(document.getElementById("gone").innerText)`)
	picture(t, b, "page-gone.png")
	again, err := net.Listen("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	run(again)
	b.click("#again")
	b.until(`document.getElementById("gone").hidden && !document.body.classList.contains("old")`)
	b.forgive()
}

func testStuck(t *testing.T, c *chrome) {
	f := network(3)
	f.err = errors.New("the loop has not come round for 12s")
	b := c.open(t, screen{width: 1280, height: 860}, serve(t, f))
	b.until(
		`!document.getElementById("gone").hidden && document.getElementById("gone-text").textContent.includes("the loop has not come round for 12s")`,
	)
	b.until(`!document.getElementById("gone").innerText.includes("Showing")`) // it never was anything else
	f.change(func(f *fake) { f.err = nil })
	cellsAre(b, 3)
	b.until(`document.getElementById("gone").hidden`)
	b.forgive()
}

func testHidden(t *testing.T, c *chrome) {
	f := network(3)
	b := c.open(t, screen{width: 1280, height: 860}, serve(t, f))
	cellsAre(b, 3)
	hide := func(hidden bool) {
		eval[any](
			b,
			fmt.Sprintf(
				`Object.defineProperty(document, "hidden", {value: %v, configurable: true}), document.dispatchEvent(new Event("visibilitychange"))`,
				hidden,
			),
		)
	}
	hide(true)
	time.Sleep(500 * time.Millisecond) // a question may be on its way
	before := f.questions()
	time.Sleep(4 * time.Second) // nothing to wait for: nothing is to happen
	if after := f.questions(); after != before {
		t.Errorf("%d questions from a page that nobody sees", after-before)
	}
	hide(false)
	for end := time.Now().Add(patience); f.questions() == before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("no question after the page is seen again")
		}
	}
}

func testHostile(t *testing.T, c *chrome) {
	f := hostileNetwork()
	b := c.open(t, screen{width: 1280, height: 860}, serve(t, f))
	cellsAre(b, 3)
	b.click("#grid [role=gridcell]")
	b.until(`document.getElementById("details-name").textContent.startsWith("<script>alert(1)")`)
	f.change(func(*fake) {})
	b.until(
		`document.getElementById("name").textContent.startsWith("<script>alert(1)") && document.getElementById("facts").textContent.includes("<img src=x")`,
	)
	if got := eval[int](b, `document.querySelectorAll("img, body script").length`); got != 0 {
		t.Errorf("%d elements came from names", got)
	}
	b.until(`document.documentElement.scrollWidth <= 1280`)
}

func testNone(t *testing.T, c *chrome) {
	b := c.open(t, screen{width: 1280, height: 860}, serve(t, network(0)))
	b.until(
		`document.getElementById("none").textContent === "This node has no peers yet." && !document.getElementById("none").hidden`,
	)
	cellsAre(b, 0)
}

// testTerminal takes pictures of what `overlayd status` prints.
func testTerminal(t *testing.T, c *chrome) {
	good, bad := network(100), network(100)
	fail(&bad.node)
	var parts []string
	for _, n := range []status.Node{good.node, bad.node} {
		var out strings.Builder
		if err := n.Print(&out, status.Style{Colour: true}); err != nil {
			t.Fatal(err)
		}
		parts = append(parts, "<pre><b>$</b> overlayd status\n"+terminal(out.String())+"</pre>")
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		fmt.Fprint(w, `<!doctype html><link rel=icon href="data:,"><title>overlayd status</title><style>
body { margin: 0; padding: 18px 22px; background: #14171b; color: #d9dde2; width: max-content }
pre { margin: 0; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; white-space: pre-wrap; max-width: 164ch }
pre + pre { margin-top: 22px; padding-top: 18px; border-top: 1px solid #343a41 }
b { color: #8b949e } .c1 { font-weight: 700 } .c31 { color: #ff7b72 } .c32 { color: #7ee29a } .c33 { color: #f2cc60 } .c36 { color: #79c0ff } .c2 { color: #8b949e }
</style>`, strings.Join(parts, "\n"))
	}))
	t.Cleanup(srv.Close)
	b := c.open(t, screen{width: 1400, height: 200}, srv.URL)
	size := eval[[2]int](
		b,
		`[Math.ceil(document.body.getBoundingClientRect().width), Math.ceil(document.body.getBoundingClientRect().height)]`,
	)
	b.must(
		c.call(
			b.session,
			"Emulation.setDeviceMetricsOverride",
			object{"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": false},
			nil,
		),
	)
	if text := eval[string](
		b,
		"document.body.innerText",
	); !strings.Contains(text, "NOT READY") ||
		strings.Contains(text, "\x1b") {
		t.Errorf("it says:\n%s", text)
	}
	picture(t, b, "status.png")
}

// terminal makes markup of a text with the escape sequences for colours.
func terminal(text string) string {
	open := false
	return regexp.MustCompile(`\x1b\[[0-9;]*m`).ReplaceAllStringFunc(html.EscapeString(text), func(s string) string {
		out := ""
		if open {
			out, open = "</span>", false
		}
		if code := strings.Trim(s, "\x1b[m"); code != "0" && code != "" {
			out, open = out+`<span class="c`+strings.ReplaceAll(code, ";", " c")+`">`, true
		}
		return out
	})
}
