// Command traefik is an ingress controller of traefik's parts: its reader of the Kubernetes API, its rules and its
// store of certificates. The whole of traefik links clients of two hundred DNS services.
package main

import (
	"context"
	"crypto/tls"
	"errors"
	"log"
	"math/rand/v2"
	"net/http"
	"net/http/httputil"
	"net/url"
	"sync/atomic"

	"github.com/traefik/traefik/v3/pkg/config/dynamic"
	"github.com/traefik/traefik/v3/pkg/middlewares/requestdecorator"
	rules "github.com/traefik/traefik/v3/pkg/muxer/http"
	"github.com/traefik/traefik/v3/pkg/provider/kubernetes/ingress"
	"github.com/traefik/traefik/v3/pkg/safe"
	certificates "github.com/traefik/traefik/v3/pkg/tls"
)

func main() {
	ctx := context.Background()
	changes, c := make(chan dynamic.Message), controller{store: certificates.NewManager(nil)}
	if err := (&ingress.Provider{}).Provide(changes, safe.NewPool(ctx)); err != nil {
		log.Fatal(err)
	}
	if err := c.follow(ctx, (<-changes).Configuration); err != nil {
		log.Fatal(err)
	}
	go func() { log.Fatal(http.ListenAndServe(":8000", &c)) }()
	go func() {
		s := http.Server{Addr: ":8443", Handler: &c, TLSConfig: &tls.Config{GetConfigForClient: c.certificate}}
		log.Fatal(s.ListenAndServeTLS("", ""))
	}()
	for m := range changes {
		if err := c.follow(ctx, m.Configuration); err != nil {
			log.Print(err)
		}
	}
}

// controller has what the cluster's Ingresses say.
type controller struct {
	routes atomic.Pointer[rules.Muxer]
	store  *certificates.Manager
}

func (c *controller) follow(ctx context.Context, to *dynamic.Configuration) error {
	parser, err := rules.NewSyntaxParser()
	errs, routes := []error{err}, rules.NewMuxer(parser, nil)
	for _, r := range to.HTTP.Routers {
		var servers []*url.URL
		for _, s := range to.HTTP.Services[r.Service].LoadBalancer.Servers {
			u, err := url.Parse(s.URL)
			errs, servers = append(errs, err), append(servers, u)
		}
		proxy := &httputil.ReverseProxy{Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(servers[rand.IntN(len(servers))])
			p.SetXForwarded()
		}}
		errs = append(errs, routes.AddRoute(r.Rule, r.RuleSyntax, rules.GetRulePriority(r.Rule), ingress.ProviderName, proxy))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	c.routes.Store(routes)
	var found []*certificates.CertAndStores
	if to.TLS != nil {
		found = to.TLS.Certificates
	}
	options := map[string]certificates.Options{certificates.DefaultTLSConfigName: certificates.DefaultTLSOptions}
	c.store.UpdateConfigs(ctx, nil, options, found)
	return nil
}

func (c *controller) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	requestdecorator.New(nil).ServeHTTP(w, r, c.routes.Load().ServeHTTP)
}

func (c *controller) certificate(*tls.ClientHelloInfo) (*tls.Config, error) {
	return c.store.Get(certificates.DefaultTLSStoreName, certificates.DefaultTLSConfigName)
}
