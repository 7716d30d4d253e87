// Package etcd is the lease manager on etcd (client v3): it reads the table of all leases and keeps it current, and it
// acquires and keeps this node's own lease. Every write is one transaction, guarded on what it was decided by.
package etcd

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/overlayd/overlayd/subnet"
)

// The values that the zero Options stand for.
const (
	DefaultPrefix         = "/overlayd/network"
	DefaultLeaseTTL       = 24 * time.Hour
	DefaultRequestTimeout = 5 * time.Second
)

// Options say where the store is and who asks. The flags named in the errors are those of the overlayd command.
type Options struct {
	// Endpoints begin with http:// or https://, all alike; without a scheme it is http, or https if there are TLS files.
	Endpoints []string
	Prefix    string

	CertFile, KeyFile string // the client's certificate and key, PEM
	CAFile            string // who vouches for the server; the system's CAs where empty

	Username, Password string
	PasswordFile       string // instead of Password; read again for each login

	LeaseTTL       time.Duration // of the etcd lease that a new key is attached to
	RequestTimeout time.Duration // of one request to the store

	// InitConfig is put at PREFIX/config when there is nothing.
	InitConfig []byte

	// Parse makes an entry of a key and its value; nil: subnet.ParseEntry. Managers of many nodes in one process can share
	// the entries by it: each of them has all.
	Parse func(key string, value []byte, revision, created, leaseID int64) *subnet.Entry
}

// CleanPrefix is a prefix as it stands in the store's keys; nothing is the default one.
func CleanPrefix(prefix string) string { return "/" + strings.Trim(cmp.Or(prefix, DefaultPrefix), "/") }

func (o Options) withDefaults() Options {
	o.Prefix = CleanPrefix(o.Prefix)
	if o.LeaseTTL == 0 {
		o.LeaseTTL = DefaultLeaseTTL
	}
	if o.RequestTimeout == 0 {
		o.RequestTimeout = DefaultRequestTimeout
	}
	if o.Parse == nil {
		o.Parse = subnet.ParseEntry
	}
	return o
}

// check completes the options and says all that is wrong with them, one line each.
func (o Options) check() (Options, error) {
	o = o.withDefaults()
	var err error
	o.Endpoints, err = o.endpoints()
	return o, errors.Join(err, o.checkTLS(), o.checkUser(), o.checkRest())
}

func (o Options) hasTLSFiles() bool { return o.CertFile != "" || o.KeyFile != "" || o.CAFile != "" }

func (o Options) tls() bool {
	return len(o.Endpoints) > 0 && strings.HasPrefix(o.Endpoints[0], "https://")
}

func (o Options) endpoints() ([]string, error) {
	if len(o.Endpoints) == 0 {
		return nil, errors.New("--etcd-endpoints: expected at least one URL such as http://127.0.0.1:2379")
	}
	out := make([]string, 0, len(o.Endpoints))
	schemes := map[string]bool{}
	for _, e := range o.Endpoints {
		u, err := o.endpoint(strings.TrimSpace(e))
		if err != nil {
			return nil, err
		}
		schemes[u.Scheme] = true
		out = append(out, u.String())
	}
	if len(schemes) > 1 {
		return nil, errors.New("--etcd-endpoints: expected all http:// or all https://, found both")
	}
	if schemes["http"] && o.hasTLSFiles() {
		return nil, errors.New("--etcd-endpoints: http:// means no TLS, but TLS files are given " +
			"(--etcd-cafile, --etcd-certfile, --etcd-keyfile)")
	}
	return out, nil
}

func (o Options) endpoint(e string) (*url.URL, error) {
	bareIPv6 := regexp.MustCompile(`^[0-9a-fA-F]*:[0-9a-fA-F]*:[0-9a-fA-F:.]*/?$`)
	full := e
	if !strings.Contains(e, "://") {
		full = "http://" + e
		if o.hasTLSFiles() {
			full = "https://" + e
		}
	}
	scheme, rest, _ := strings.Cut(full, "://")
	u, err := url.Parse(full)
	switch {
	case strings.Contains(scheme, "srv") || scheme == "dns" || strings.HasPrefix(rest, "_"):
		return nil, fmt.Errorf("--etcd-endpoints: DNS SRV records are not looked up, list the endpoints; found %q",
			redact(e))
	case bareIPv6.MatchString(rest):
		return nil, fmt.Errorf("--etcd-endpoints: an IPv6 address needs brackets, as in http://[fd00::1]:2379; found %q", e)
	case err != nil || u.Hostname() == "" || u.Scheme != "http" && u.Scheme != "https":
		return nil, fmt.Errorf("--etcd-endpoints: expected http://HOST:PORT or https://HOST:PORT, found %q", redact(e))
	case u.User != nil:
		return nil, errors.New("--etcd-endpoints: a user and password don't belong there, " +
			"use --etcd-username and --etcd-password")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return nil, fmt.Errorf("--etcd-endpoints: expected nothing after the port, found %q", redact(e))
	case u.Port() == "":
		u.Host = strings.TrimSuffix(u.Host, ":") + ":2379"
	}
	if port, err := strconv.ParseUint(u.Port(), 10, 16); err != nil || port == 0 {
		return nil, fmt.Errorf("--etcd-endpoints: expected a port from 1 to 65535, found %q", redact(e))
	}
	return &url.URL{Scheme: u.Scheme, Host: u.Host}, nil
}

// redact takes out what stands before an @: it may be a password.
func redact(e string) string {
	if at := strings.LastIndexByte(e, '@'); at >= 0 {
		return "..." + e[at:]
	}
	return e
}

func (o Options) checkTLS() error {
	if (o.CertFile == "") != (o.KeyFile == "") {
		return errors.New("--etcd-certfile and --etcd-keyfile: expected both or none")
	}
	_, err := o.tlsConfig()
	return err
}

func (o Options) checkUser() error {
	switch {
	case o.Password != "" && o.PasswordFile != "":
		return errors.New("--etcd-password and --etcd-password-file: expected one of the two")
	case o.Username == "" && (o.Password != "" || o.PasswordFile != ""):
		return errors.New("--etcd-username: expected a name, since a password is given")
	case o.Username != "" && o.Password == "" && o.PasswordFile == "":
		return errors.New("--etcd-password or --etcd-password-file: expected one of the two, " +
			"since --etcd-username is given")
	}
	_, err := o.password()
	return err
}

// password reads the password again each time, so that a replaced file is noticed.
func (o Options) password() (string, error) {
	if o.PasswordFile == "" {
		return o.Password, nil
	}
	b, err := os.ReadFile(o.PasswordFile)
	if err != nil {
		return "", fmt.Errorf("--etcd-password-file: %w", err)
	}
	p := strings.TrimRight(string(b), "\r\n")
	if p == "" {
		return "", fmt.Errorf("--etcd-password-file: %s is empty", o.PasswordFile)
	}
	return p, nil
}

func (o Options) checkRest() error {
	var errs []error
	if o.Prefix == "/" {
		errs = append(errs, errors.New("--etcd-prefix: expected a path such as "+DefaultPrefix))
	}
	if o.LeaseTTL < time.Second || o.LeaseTTL/time.Second > clientv3.MaxLeaseTTL {
		errs = append(errs, fmt.Errorf("--lease-ttl: expected at least 1s, found %s", o.LeaseTTL))
	}
	if o.InitConfig != nil {
		if _, err := subnet.ParseConfig(o.InitConfig); err != nil {
			errs = append(errs, fmt.Errorf("--init-config: %w", err))
		}
	}
	return errors.Join(errs...)
}
