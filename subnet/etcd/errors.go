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

// storeError is a failed request to the store, in plain words; the client's own error stays reachable by errors.As.
type storeError struct {
	reason string
	err    error
}

func (e *storeError) Error() string { return "etcd: " + e.reason }

// Reason is the error without the word that says whose it is, for where that is said already.
func (e *storeError) Reason() string { return e.reason }
func (e *storeError) Unwrap() error  { return e.err }

// explain puts the errors that an operator meets into words that say what to check. Where is the endpoint that failed.
func explain(err error, o Options, where string) error {
	if err == nil {
		return nil
	}
	if s := (*storeError)(nil); errors.As(err, &s) {
		return err
	}
	return &storeError{reason(err, o, where), rpctypes.Error(err)}
}

// noProgress is the error where a watch breaks before it has told anything.
func noProgress(err error) error {
	return &storeError{"the watch of the leases makes no progress: " + strings.TrimPrefix(err.Error(), "etcd: "), err}
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
	// The port on our side is another one each time: the same failure would look like a new one.
	text := regexp.MustCompile(`\S+:\d+->`).ReplaceAllString(withoutCodes(err.Error()), "")
	if r := clientReason(text, o); r != "" {
		return r
	}
	r := endpointReason(text, where)
	switch {
	case r != "":
	case errors.Is(err, context.DeadlineExceeded) || status.Code(err) == codes.DeadlineExceeded:
		r = fmt.Sprintf("no answer from %s within %s", where, o.RequestTimeout.Round(time.Millisecond))
	default:
		r = text
	}
	if len(o.Endpoints) > 1 && !strings.Contains(r, where) {
		r = where + ": " + r
	}
	return r
}

// cause is what the text of an error means that a pattern matches.
type cause struct{ pattern, means string }

func find(causes []cause, text string) string {
	for _, c := range causes {
		if regexp.MustCompile(c.pattern).MatchString(text) {
			return c.means
		}
	}
	return ""
}

// clientReason is about who asks: all endpoints say the same.
func clientReason(text string, o Options) string {
	user := "a client without a user name"
	switch {
	case o.Username != "":
		user = fmt.Sprintf("user %q", o.Username)
	case o.CertFile != "":
		user = "the user that the client certificate names"
	}
	return find([]cause{
		{rpctypes.ErrAuthFailed.Error(), "wrong user name or password for " + user +
			" (--etcd-username, --etcd-password, --etcd-password-file)"},
		{rpctypes.ErrUserEmpty.Error(), "etcd requires a user name and password (--etcd-username, --etcd-password)"},
		{rpctypes.ErrPermissionDenied.Error(), "permission denied for " + user +
			": it needs to read and write " + o.Prefix + "/"},
	}, text)
}

// endpointReason is about one endpoint.
func endpointReason(text, where string) string {
	// The rest of the text is about the DNS server, not about the endpoint.
	if _, lookup, ok := strings.Cut(text, ": lookup "); ok {
		return "cannot resolve the name in --etcd-endpoints: " + strings.TrimSuffix(lookup, `"`)
	}
	return find([]cause{
		{"certificate signed by unknown authority", "the server's certificate is signed by an unknown authority " +
			"(--etcd-cafile)"},
		{"certificate has expired or is not yet valid", "the server's certificate has expired or is not valid yet"},
		{"x509: (certificate is valid|cannot validate certificate) for", "the server's certificate is not for the name or " +
			"address in --etcd-endpoints"},
		{"tls: certificate required", "the server requires a client certificate (--etcd-certfile, --etcd-keyfile)"},
		{"tls: bad certificate", "the server rejects the client certificate (--etcd-certfile)"},
		{"tls: expired certificate", "the client certificate has expired (--etcd-certfile)"},
		{"tls: unknown certificate authority", "the server does not trust the client certificate's issuer (--etcd-certfile)"},
		{"does not look like a TLS handshake|handshake failed: EOF", "the server does not speak TLS, or ended " +
			"its handshake (http:// in --etcd-endpoints?)"},
		{"error reading server preface: EOF", "the server closed the connection at once: it speaks TLS " +
			"(https:// in --etcd-endpoints?), or it is not etcd"},
		{"connection refused", "connection refused by " + where},
		{"keepalive ping failed|closed network connection|client connection is closing|i/o timeout", "no answer from " +
			where},
		{"transport is closing|broken pipe|connection reset by peer", where + " closed the connection"},
		{"no route to host", "no route to " + where},
		{"network is unreachable", "the network of " + where + " is unreachable"},
		{rpctypes.ErrNoLeader.Error(), "the etcd cluster has no leader"},
		{rpctypes.ErrorDesc(rpctypes.ErrGRPCNotSupportedForLearner), where +
			" is a learner and serves no requests until promoted (etcdctl member promote)"},
	}, text)
}

// withoutCodes is an error's text without gRPC's wrapping.
func withoutCodes(text string) string {
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
func cancelled(reason string) error { return rpctypes.Error(errors.New(withoutCodes(reason))) }

// loginEnded reports whether the store no longer accepts a login, so that a new one is due.
func loginEnded(err error) bool {
	known := rpctypes.Error(err)
	return errors.Is(known, rpctypes.ErrInvalidAuthToken) || errors.Is(known, rpctypes.ErrUserEmpty) ||
		errors.Is(known, rpctypes.ErrAuthOldRevision)
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
	isLearner := errors.Is(rpctypes.Error(err), rpctypes.Error(rpctypes.ErrGRPCNotSupportedForLearner))
	return isLearner || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)
}

// unreachable reports whether the store could not be asked, or did not accept who asks.
func unreachable(err error) bool {
	return faulty(err) || loginEnded(err) || errors.Is(rpctypes.Error(err), rpctypes.ErrAuthFailed)
}
