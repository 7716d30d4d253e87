package page

import (
	"bufio"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// patience bounds everything that a test waits for, on a machine that does other things as well. After an answer that
// took up to six seconds, the page asks for the peers 20 times as long after it.
const patience = 150 * time.Second

// chrome is a headless Chromium that is driven through two pipes, with the DevTools protocol.
type chrome struct {
	in *os.File

	mu      sync.Mutex
	next    int
	waiting map[int]chan message
	tabs    map[string]*tab
	gone    error
}

type message struct {
	ID        int             `json:"id,omitempty"`
	Method    string          `json:"method,omitempty"`
	SessionID string          `json:"sessionId,omitempty"`
	Params    json.RawMessage `json:"params,omitempty"`
	Result    json.RawMessage `json:"result,omitempty"`
	Error     *struct {
		Message string `json:"message"`
	} `json:"error,omitempty"`
}

// startChrome runs a Chromium until the test ends. Without one the test fails: the page is not tested then.
func startChrome(t *testing.T) *chrome {
	t.Helper()
	program := ""
	for _, name := range []string{"chromium-headless-shell", "chromium", "google-chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			program = found
			break
		}
	}
	if program == "" {
		t.Fatal("no Chromium here: install the package chromium-headless-shell (Debian) or chromium")
	}
	theirIn, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(
		program,
		"--headless",
		"--no-sandbox",
		"--disable-gpu",
		"--disable-dev-shm-usage",
		"--hide-scrollbars",
		"--remote-debugging-pipe",
		"--no-first-run",
		"--disable-background-networking",
		"--force-color-profile=srgb",
		"--user-data-dir="+t.TempDir(),
		"about:blank",
	)
	cmd.ExtraFiles = []*os.File{theirIn, theirOut}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start %s: %v", program, err)
	}
	theirIn.Close()
	theirOut.Close()
	c := &chrome{in: in, waiting: map[int]chan message{}, tabs: map[string]*tab{}}
	read := make(chan struct{})
	go func() {
		defer close(read)
		c.read(out)
	}()
	t.Cleanup(func() {
		in.Close()
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
		<-read
		out.Close()
	})
	return c
}

func (c *chrome) read(out *os.File) {
	for r := bufio.NewReader(out); ; {
		raw, err := r.ReadBytes(0)
		if err != nil {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.gone = fmt.Errorf("Chromium has ended: %w", err)
			for id, w := range c.waiting {
				delete(c.waiting, id)
				close(w)
			}
			return
		}
		var m message
		if json.Unmarshal(raw[:len(raw)-1], &m) != nil {
			continue
		}
		c.mu.Lock()
		if w := c.waiting[m.ID]; w != nil && m.ID != 0 {
			delete(c.waiting, m.ID)
			w <- m
		} else if tab := c.tabs[m.SessionID]; tab != nil {
			tab.note(m)
		}
		c.mu.Unlock()
	}
}

func (c *chrome) call(session, method string, params, result any) error {
	raw, err := json.Marshal(params)
	if err != nil {
		return err
	}
	answer := make(chan message, 1)
	c.mu.Lock()
	if c.gone != nil {
		c.mu.Unlock()
		return c.gone
	}
	c.next++
	id := c.next
	c.waiting[id] = answer
	text, err := json.Marshal(message{ID: id, Method: method, SessionID: session, Params: raw})
	if err == nil {
		_, err = c.in.Write(append(text, 0))
	}
	c.mu.Unlock()
	if err != nil {
		return err
	}
	select {
	case m, ok := <-answer:
		switch {
		case !ok:
			return fmt.Errorf("%s: Chromium has ended", method)
		case m.Error != nil:
			return fmt.Errorf("%s: %s", method, m.Error.Message)
		case result == nil:
			return nil
		}
		return json.Unmarshal(m.Result, result)
	case <-time.After(patience):
		return fmt.Errorf("%s: no answer from Chromium in %v", method, patience)
	}
}

// tab is one page in the browser.
type tab struct {
	t       *testing.T
	c       *chrome
	session string
	errors  []string // that the page ran into, its own and those of the browser (such as what the policy forbids)
}

type screen struct {
	width, height int
	dark, phone   bool
	noScript      bool
}

type object map[string]any

// open shows an address on a screen. When the test ends, the page must have run into no error.
func (c *chrome) open(t *testing.T, s screen, url string) *tab {
	t.Helper()
	var target struct {
		TargetID string `json:"targetId"`
	}
	var attached struct {
		SessionID string `json:"sessionId"`
	}
	b := &tab{t: t, c: c}
	b.must(c.call("", "Target.createTarget", object{"url": "about:blank", "width": s.width, "height": s.height}, &target))
	b.must(c.call("", "Target.attachToTarget", object{"targetId": target.TargetID, "flatten": true}, &attached))
	b.session = attached.SessionID
	c.mu.Lock()
	c.tabs[b.session] = b
	c.mu.Unlock()
	scheme := "light"
	if s.dark {
		scheme = "dark"
	}
	for _, call := range []struct {
		method string
		params object
	}{
		{"Page.enable", object{}},
		{"Runtime.enable", object{}},
		{"Log.enable", object{}},
		{"Emulation.setDeviceMetricsOverride", object{
			"width": s.width, "height": s.height, "deviceScaleFactor": 1,
			"mobile": s.phone,
		}},
		{"Emulation.setTouchEmulationEnabled", object{"enabled": s.phone}},
		{"Emulation.setEmulatedMedia", object{"features": []object{{"name": "prefers-color-scheme", "value": scheme}}}},
		{"Emulation.setScriptExecutionDisabled", object{"value": s.noScript}},
		{"Emulation.setFocusEmulationEnabled", object{"enabled": true}},
		{"Page.navigate", object{"url": url}},
	} {
		b.must(c.call(b.session, call.method, call.params, nil))
	}
	b.until("document.readyState === 'complete' && location.href !== 'about:blank'")
	t.Cleanup(func() {
		_ = c.call("", "Target.closeTarget", object{"targetId": target.TargetID}, nil)
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.tabs, b.session)
		if len(b.errors) > 0 {
			t.Errorf("the page ran into: %s", strings.Join(b.errors, "\n"))
		}
	})
	return b
}

// note keeps what went wrong in the page.
func (b *tab) note(m message) {
	var p struct {
		Entry            struct{ Level, Text, URL string }
		ExceptionDetails struct {
			Text      string
			Exception struct{ Description string }
		}
	}
	_ = json.Unmarshal(m.Params, &p)
	switch {
	case m.Method == "Runtime.exceptionThrown":
		b.errors = append(b.errors, p.ExceptionDetails.Text+" "+p.ExceptionDetails.Exception.Description)
	case m.Method == "Log.entryAdded" && p.Entry.Level == "error":
		b.errors = append(b.errors, p.Entry.Text+" "+p.Entry.URL)
	}
}

// forgive forgets the errors so far: a test made them happen.
func (b *tab) forgive() {
	b.c.mu.Lock()
	defer b.c.mu.Unlock()
	b.errors = nil
}

func (b *tab) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// eval runs an expression in the page.
func eval[T any](b *tab, expression string) T {
	b.t.Helper()
	var r struct {
		Result           struct{ Value T }
		ExceptionDetails *struct{ Exception struct{ Description string } }
	}
	b.must(
		b.c.call(
			b.session,
			"Runtime.evaluate",
			object{"expression": expression, "returnByValue": true, "awaitPromise": true},
			&r,
		),
	)
	if r.ExceptionDetails != nil {
		b.t.Fatalf("%s: %s", expression, r.ExceptionDetails.Exception.Description)
	}
	return r.Result.Value
}

// until waits for an expression to be true.
func (b *tab) until(expression string) {
	b.t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if eval[bool](b, "!!("+expression+")") {
			return
		}
		if time.Now().After(end) {
			b.t.Fatalf(
				"not within %v: %s; the page says:\n%.2000s",
				patience,
				expression,
				eval[string](b, "document.body.innerText"),
			)
		}
	}
}

// click clicks in the middle of an element, as a mouse does.
func (b *tab) click(selector string) {
	b.t.Helper()
	at := eval[[2]float64](b, fmt.Sprintf(
		`(() => { const e = document.querySelector(%q); e.scrollIntoView({block: "center"}); const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()`,
		selector,
	))
	for _, kind := range []string{"mouseMoved", "mousePressed", "mouseReleased"} {
		p := object{"type": kind, "x": at[0], "y": at[1], "button": "left", "clickCount": 1}
		if kind == "mouseMoved" {
			p = object{"type": kind, "x": at[0], "y": at[1]}
		}
		b.must(b.c.call(b.session, "Input.dispatchMouseEvent", p, nil))
	}
}

// press presses keys by their names, one after the other.
func (b *tab) press(keys ...string) {
	b.t.Helper()
	codes := map[string]int{
		"Enter":      13,
		"Escape":     27,
		"Tab":        9,
		"Home":       36,
		"End":        35,
		"ArrowLeft":  37,
		"ArrowUp":    38,
		"ArrowRight": 39,
		"ArrowDown":  40,
	}
	for _, key := range keys {
		down := object{"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
		if len(key) == 1 {
			down = object{"type": "keyDown", "key": key, "text": key}
		} else if key == "Enter" {
			down["text"] = "\r"
		}
		b.must(b.c.call(b.session, "Input.dispatchKeyEvent", down, nil))
		b.must(
			b.c.call(
				b.session,
				"Input.dispatchKeyEvent",
				object{"type": "keyUp", "key": key, "code": key, "windowsVirtualKeyCode": codes[key]},
				nil,
			),
		)
	}
}

// write types a text.
func (b *tab) write(text string) {
	b.t.Helper()
	b.must(b.c.call(b.session, "Input.insertText", object{"text": text}, nil))
}

// shot is a picture of what the screen shows, as PNG.
func (b *tab) shot() []byte {
	b.t.Helper()
	var r struct{ Data string }
	b.must(b.c.call(b.session, "Page.captureScreenshot", object{"format": "png", "optimizeForSpeed": false}, &r))
	raw, err := base64.StdEncoding.DecodeString(r.Data)
	b.must(err)
	return raw
}
