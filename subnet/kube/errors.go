package kube

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// storeError is a failed request to the API server, in plain words. The client's own error can be had by errors.As.
type storeError struct {
	reason string
	err    error
}

func (e *storeError) Error() string { return "the Kubernetes API: " + e.reason }

// Reason is the error without the words that say whose it is, for where that is said already.
func (e *storeError) Reason() string { return e.reason }
func (e *storeError) Unwrap() error  { return e.err }

// explain puts the errors that an operator meets into words that say what to check.
func (c connection) explain(err error) error {
	if err == nil {
		return nil
	}
	if s := (*storeError)(nil); errors.As(err, &s) {
		return err
	}
	return &storeError{c.reason(err), err}
}

func (c connection) reason(err error) string {
	var request *url.Error
	var dial *net.OpError
	switch {
	case apierrors.IsForbidden(err): // it names who lacks which permission
		return "permission denied: " + err.Error()
	case apierrors.IsUnauthorized(err):
		return fmt.Sprintf("%s does not accept the credentials (the pod's service account token, or those of --kubeconfig)",
			c.server)
	case errors.Is(err, context.DeadlineExceeded), apierrors.IsTimeout(err), apierrors.IsServerTimeout(err):
		return "no answer from " + c.server
	case errors.As(err, &dial):
		return fmt.Sprintf("cannot connect to %s: %s", c.server, dial.Err)
	case errors.As(err, &request): // without the query, which is another one each time
		return fmt.Sprintf("%s: %s", c.server, request.Err)
	}
	return strings.TrimSpace(err.Error())
}
