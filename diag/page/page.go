// Package page serves the node's web page: its state, and its peers as tiles. All values and texts are made here; the
// script only puts them in place, so the page says the same without it.
package page

import (
	"bytes"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/json"
	"fmt"
	"html/template"
	"net/http"
	"time"

	"github.com/overlayd/overlayd/diag/status"
)

// Source provides what the page shows. The page reports an error.
type Source interface {
	Status(ctx context.Context) (status.Node, error)
	Peers(ctx context.Context) ([]status.Peer, error)
}

// answerWithin bounds the wait for the source.
const answerWithin = 2 * time.Second

//go:embed assets
var assets embed.FS

// Handler serves the page at / and its parts under /page/. All its links are relative, so it works behind a proxy that
// adds a prefix.
func Handler(s Source) http.Handler { return newHandler(s, time.Now) }

func newHandler(s Source, now func() time.Time) http.Handler {
	h := handler{source: s, now: now, page: template.Must(template.ParseFS(assets, "assets/page.html"))}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /{$}", h.servePage)
	mux.HandleFunc("GET /page/node.json", h.serveNode)
	mux.HandleFunc("GET /page/peers.json", h.servePeers)
	for name, kind := range map[string]string{
		"page.css": "text/css; charset=utf-8", "page.js": "text/javascript; charset=utf-8", "icon.svg": "image/svg+xml",
	} {
		mux.Handle("GET /page/"+name, asset(name, kind))
	}
	return guarded(mux)
}

// guarded lets a browser load and run only what this server sends, and forbids other sites to embed the page. Names and
// reasons come from other nodes: even if one evaded the escaping, it could not run a script.
func guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "+
			"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// asset serves an embedded file. A browser may cache it, but asks each time whether it is still current.
func asset(name, kind string) http.Handler {
	content, err := assets.ReadFile("assets/" + name)
	if err != nil {
		return http.NotFoundHandler()
	}
	etag := fmt.Sprintf(`"%x"`, sha256.Sum256(content))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-cache")
		w.Header().Set("ETag", etag)
		w.Header().Set("Content-Type", kind)
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(content))
	})
}

type handler struct {
	source Source
	now    func() time.Time
	page   *template.Template
}

// document is the input of the page template.
type document struct {
	node
	Error  string // of the source
	Legend []legendItem
	Steps  []step
	Count  int           // of peers
	Rows   template.HTML // of the table of peers, the worst first
}

func (h handler) servePage(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	code, doc := http.StatusOK, document{}
	n, err := h.source.Status(ctx)
	var all []status.Peer
	if err == nil {
		doc.node = nodeView(n)
		all, err = h.source.Peers(ctx)
	} else {
		doc.node = unknownNode()
	}
	if err != nil {
		code, doc.Error = http.StatusServiceUnavailable, noAnswer(err)
	}
	peers := peerViews(all, h.now())
	doc.Legend, doc.Steps = legend(peers)
	worstFirst(peers)
	doc.Count, doc.Rows = len(peers), rows(peers)
	var b bytes.Buffer
	if err := h.page.Execute(&b, doc); err != nil {
		http.Error(w, "cannot render the page: "+err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(code)
	_, _ = w.Write(b.Bytes())
}

// noAnswer explains an error of the source.
func noAnswer(err error) string {
	return status.Shorten("overlayd is running, but its status is unavailable: "+err.Error(), status.LongText)
}

func (h handler) serveNode(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	n, err := h.source.Status(ctx)
	serveJSON(w, nodeView(n), err)
}

func (h handler) servePeers(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), answerWithin)
	defer cancel()
	all, err := h.source.Peers(ctx)
	serveJSON(w, peerViews(all, h.now()), err)
}

func serveJSON(w http.ResponseWriter, v any, err error) {
	if err != nil {
		http.Error(w, noAnswer(err), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}
