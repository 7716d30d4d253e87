// Package examine is what a diagnosis asks of a store, whichever it is.
package examine

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net/http"
	"time"

	"github.com/overlayd/overlayd/subnet"
)

// Store is a store as a diagnosis sees it.
type Store struct {
	OptionsErr   error // the options make no sense: nothing was asked
	Endpoints    []Endpoint
	Certificates []Certificate // of the files, and of each server

	Table    subnet.Table // what is there; its ConfigErr says what is wrong with the config
	TableErr error        // why it could not be read
	// WriteErr is why this client may not write leases, or the store takes no writes. Nothing is written to find out.
	WriteErr error
	NoConfig bool // there is no config at all
	// OwnErr is why there can be no lease of this node: in Kubernetes, its Node is not there, or has no podCIDRs.
	OwnErr error
}

// Endpoint is a server of the store.
type Endpoint struct {
	URL     string
	Err     error         // why it can't be used
	Took    time.Duration // of one request that the whole cluster has to agree on, when the connection was there
	Version string
	Alarms  []string // "NOSPACE" and the like
	// Clock is how far this node's clock is ahead of the server's; ClockErr why that is not known. It is good to a second.
	Clock    time.Duration
	ClockErr error
}

// Certificate is one that has to be valid.
type Certificate struct {
	What      string // the flag that names its file, or the endpoint that shows it
	File      string // empty for a server's
	Subject   string
	NotBefore time.Time
	NotAfter  time.Time
}

// CertificateOf describes a certificate.
func CertificateOf(what, file string, c *x509.Certificate) Certificate {
	return Certificate{what, file, c.Subject.String(), c.NotBefore, c.NotAfter}
}

// CompareClocks compares the clocks by the Date of an HTTP answer, which etcd and the API server give at the same port
// as all else, whoever asks. It returns the certificate that the server shows, whether it can be trusted or not: that
// is said by the requests. If it can't, a wrong clock may be why.
func (e *Endpoint) CompareClocks(ctx context.Context, cfg *tls.Config) (shown *x509.Certificate) {
	cfg = cfg.Clone()
	cfg.InsecureSkipVerify = true // nothing is told on this connection
	cfg.VerifyConnection = func(s tls.ConnectionState) error {
		shown = s.PeerCertificates[0]
		return nil
	}
	began := time.Now()
	theirs, err := date(ctx, &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg}, e.URL+"/version")
	middle := began.Add(time.Since(began) / 2)
	e.Clock, e.ClockErr = middle.Sub(theirs.Add(time.Second/2)), err // a date is cut off to the second
	return shown
}

func date(ctx context.Context, via *http.Transport, address string) (time.Time, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return time.Time{}, err
	}
	resp, err := via.RoundTrip(req)
	if err != nil {
		return time.Time{}, err
	}
	defer resp.Body.Close()
	return http.ParseTime(resp.Header.Get("Date"))
}
