package etcd

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// storeError is a failure of a request to the store, in plain words; what the client said stays reachable by errors.As.
type storeError struct {
	reason string
	err    error
}

func (e *storeError) Error() string { return "etcd: " + e.reason }

// Reason is the error without the word that says whose it is, for where that is said already.
func (e *storeError) Reason() string { return e.reason }
func (e *storeError) Unwrap() error  { return e.err }

// explain puts the errors that an operator meets into words that say what to look at. Where is the endpoint that
// failed.
func explain(err error, o Options, where string) error {
	if err == nil {
		return nil
	}
	if s := (*storeError)(nil); errors.As(err, &s) {
		return err
	}
	return &storeError{reason(err, o, where), rpctypes.Error(err)}
}

// noneOf is the error where no endpoint is of use: what each of them said, in the order of the list, so that the same
// fault reads the same.
func noneOf(endpoints []string, failed map[string]error) error {
	var reasons []string
	var errs []error
	for _, e := range endpoints {
		err := failed[e]
		errs = append(errs, err)
		if s := (*storeError)(nil); errors.As(err, &s) && !slices.Contains(reasons, s.reason) {
			reasons = append(reasons, s.reason)
		}
	}
	return &storeError{strings.Join(reasons, "; "), errors.Join(errs...)}
}

func reason(err error, o Options, where string) string {
	if r := authReason(err, o); r != "" {
		return r
	}
	r := endpointReason(err, o, where)
	if len(o.Endpoints) > 1 && !strings.Contains(r, where) {
		r = where + ": " + r
	}
	return r
}

// endpointReason is about one endpoint.
func endpointReason(err error, o Options, where string) string {
	// The port on our side is another one each time: the same fault would look like a new one.
	localPort := regexp.MustCompile(`\S+:\d+->`)
	text := localPort.ReplaceAllString(message(err), "")
	if r := connReason(text, where); r != "" {
		return r
	}
	switch known := rpctypes.Error(err); {
	case errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded:
		return fmt.Sprintf("no answer from %s within %s", where, o.RequestTimeout.Round(time.Millisecond))
	case errors.Is(known, rpctypes.ErrNoLeader):
		return "the etcd cluster has no leader"
	case learner(err):
		return where + " is a learner and serves no requests until promoted (etcdctl member promote)"
	}
	return text
}

// authReason is about who we are.
func authReason(err error, o Options) string {
	known := rpctypes.Error(err)
	switch {
	case errors.Is(known, rpctypes.ErrAuthFailed):
		return fmt.Sprintf("wrong user name or password for user %q (--etcd-username, --etcd-password, --etcd-password-file)", o.Username)
	case errors.Is(known, rpctypes.ErrUserEmpty):
		return "etcd requires a user name and password (--etcd-username, --etcd-password)"
	case errors.Is(known, rpctypes.ErrPermissionDenied) || strings.Contains(err.Error(), rpctypes.ErrPermissionDenied.Error()):
		return fmt.Sprintf("permission denied for %s: it needs to read and write %s/", user(o), o.Prefix)
	}
	return ""
}

// connReason is about getting there.
func connReason(text, where string) string {
	// What follows is about the DNS server, not about the endpoint.
	if _, lookup, ok := strings.Cut(text, ": lookup "); ok {
		return "cannot resolve the name in --etcd-endpoints: " + strings.TrimSuffix(lookup, `"`)
	}
	for _, k := range []struct{ has, means string }{
		{"certificate signed by unknown authority", "the server's certificate is signed by an unknown authority (--etcd-cafile)"},
		{"certificate has expired or is not yet valid", "the server's certificate has expired or is not valid yet"},
		{"x509: certificate is valid for", "the server's certificate is for another name than that in --etcd-endpoints"},
		{"x509: cannot validate certificate for", "the server's certificate does not name the address in --etcd-endpoints"},
		{"tls: certificate required", "the server requires a client certificate (--etcd-certfile, --etcd-keyfile)"},
		{"tls: bad certificate", "the server refuses the client certificate (--etcd-certfile)"},
		{"tls: expired certificate", "the client certificate has expired (--etcd-certfile)"},
		{"tls: unknown certificate authority", "the server does not trust the client certificate's issuer (--etcd-certfile)"},
		{"first record does not look like a TLS handshake", "the server does not speak TLS (http:// in --etcd-endpoints?)"},
		{"authentication handshake failed: EOF", "the server ended the TLS handshake: most likely it does not speak TLS (http:// in --etcd-endpoints?)"},
		{"error reading server preface: EOF", "the server closed the connection at once: it speaks TLS (https:// in --etcd-endpoints?), or it is not etcd"},
		{"connection refused", "connection refused by " + where},
		{"keepalive ping failed", "no answer from " + where},
		{"use of closed network connection", "no answer from " + where},
		{"client connection is closing", "no answer from " + where},
		{"transport is closing", where + " closed the connection"},
		{"i/o timeout", "no answer from " + where},
		{"broken pipe", where + " closed the connection"},
		{"connection reset by peer", where + " closed the connection"},
		{"no route to host", "no route to " + where},
		{"network is unreachable", "the network of " + where + " is unreachable"},
	} {
		if strings.Contains(text, k.has) {
			return k.means
		}
	}
	return ""
}

func user(o Options) string {
	switch {
	case o.Username != "":
		return fmt.Sprintf("user %q", o.Username)
	case o.CertFile != "":
		return "the user that the client certificate names"
	}
	return "a client without a user name"
}

// message is an error's text without gRPC's wrapping.
func message(err error) string {
	text := err.Error()
	for strings.HasPrefix(text, "rpc error: code = ") {
		_, rest, ok := strings.Cut(text, " desc = ")
		if !ok {
			break
		}
		text = rest
	}
	return text
}

// cancelled is the error for a reason that the server gave when it ended a watch.
func cancelled(reason string) error {
	err := errors.New(message(errors.New(reason)))
	return rpctypes.Error(err)
}

// loginEnded reports whether the store no longer accepts a login, so that a new one is due.
func loginEnded(err error) bool {
	known := rpctypes.Error(err)
	return errors.Is(known, rpctypes.ErrInvalidAuthToken) || errors.Is(known, rpctypes.ErrUserEmpty) ||
		errors.Is(known, rpctypes.ErrAuthOldRevision)
}

// learner reports whether a member said that it does not vote.
func learner(err error) bool {
	return errors.Is(rpctypes.Error(err), rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner))
}

// faulty reports whether it is the endpoint that failed, or the connection to it, and not the store that said no.
func faulty(err error) bool {
	code := status.Code(err)
	if e := (rpctypes.EtcdError{}); errors.As(err, &e) {
		code = e.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled, codes.Internal, codes.DataLoss, codes.Unimplemented:
		return true
	}
	return learner(err) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// unreachable reports whether the store could not be asked, or did not accept who asks.
func unreachable(err error) bool {
	return faulty(err) || loginEnded(err) || errors.Is(rpctypes.Error(err), rpctypes.ErrAuthFailed)
}
