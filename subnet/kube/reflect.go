package kube

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
)

const (
	nodesResource      = "nodes"
	configMapsResource = "configmaps"
)

// reflected is one kind of object that is listed and watched. It is the store of client-go's reflector (see
// cache.ReflectorStore), and keeps nothing: what arrives goes on to the owner of the state.
type reflected struct {
	conn            connection
	name, namespace string
	only            string // the one object of this name; "": all
	kind            runtime.Object
	newList         func() runtime.Object
	send            func(event)

	put  func(s *state, o any)
	drop func(s *state, name string, now time.Time)
	all  func(s *state, all []runtime.Object, revision int64, now time.Time)
	seen func(revision int64) // all up to there has been told
}

func (m *Manager) nodes(send func(event)) *reflected {
	return &reflected{
		conn: m.conn, name: nodesResource, kind: &corev1.Node{},
		newList: func() runtime.Object { return &corev1.NodeList{} }, send: send,
		put:  func(s *state, o any) { each(o, s.put) },
		drop: (*state).drop,
		all: func(s *state, all []runtime.Object, revision int64, now time.Time) {
			s.revision = max(s.revision, m.complete.Load()) // bookmarks tell of later ones
			s.listed(only[*corev1.Node](all), revision, now)
		},
		seen: m.complete.Store,
	}
}

func (m *Manager) configMaps(send func(event)) *reflected {
	namespace, name := m.opts.configMap()
	set := func(s *state, c *corev1.ConfigMap) { s.setConfig(c, revisionOf(c)) }
	return &reflected{
		conn: m.conn, name: configMapsResource, namespace: namespace, only: name, kind: &corev1.ConfigMap{},
		newList: func() runtime.Object { return &corev1.ConfigMapList{} }, send: send,
		put:  func(s *state, o any) { each(o, func(c *corev1.ConfigMap) { set(s, c) }) },
		drop: func(s *state, _ string, _ time.Time) { s.setConfig(nil, 0) },
		all: func(s *state, all []runtime.Object, _ int64, _ time.Time) {
			found := only[*corev1.ConfigMap](all)
			if len(found) == 0 {
				s.setConfig(nil, 0)
			}
			for _, c := range found {
				set(s, c)
			}
		},
		seen: func(int64) {},
	}
}

// each calls f if o is a T, which it is unless client-go hands over what it was not asked for.
func each[T any](o any, f func(T)) {
	if t, ok := o.(T); ok {
		f(t)
	}
}

func only[T any](all []runtime.Object) (out []T) {
	for _, o := range all {
		each(o, func(t T) { out = append(out, t) })
	}
	return out
}

// revisionOf is the resource version of an object or a list; they are numbers in order (KEP 5504). 0: it has none.
func revisionOf(o any) int64 {
	m, err := meta.CommonAccessor(o)
	if err != nil {
		return 0
	}
	return revision(m.GetResourceVersion())
}

func revision(text string) int64 {
	n, _ := strconv.ParseInt(text, 10, 64) // 0: none
	return n
}

// run lists and watches until ctx ends.
func (r *reflected) run(ctx context.Context) {
	ctx = klog.NewContext(ctx, logr.Discard()) // errors are reported to the owner of the state
	lw := &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			list, err := r.list(ctx, o)
			r.report(ctx, err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
			w, err := r.watch(ctx, o)
			r.report(ctx, r.conn.explain(err))
			var answer apierrors.APIStatus
			switch initial := o.SendInitialEvents != nil; {
			case initial && utilnet.IsConnectionRefused(err):
				err = errors.New(err.Error()) // for this one the reflector would wait on after the end of ctx
			case !initial && err != nil && !errors.As(err, &answer):
				// The reflector goes on from where it was after this one, instead of listing all: a server that is too busy to
				// answer would be asked for 5,000 Nodes by each of 5,000 nodes.
				err = apierrors.NewTooManyRequestsError(err.Error())
			}
			return w, err
		},
	}
	cache.NewReflectorWithOptions(lw, r.kind, r, cache.ReflectorOptions{
		Name: r.name, Backoff: &wait.Backoff{
			Duration: firstRetry, Factor: 2, Jitter: 1, Steps: math.MaxInt32, Cap: lastRetry / 2, // half of it is jitter
		},
	}).RunWithContext(ctx)
}

// watch goes on from a revision. If the server has not reached it, the store was restored from a backup: a watch would
// wait until it is there, and tell nothing of what is missing up to then. To ask for it also shows whether there is a
// server: a watch that gets no answer is no error for client-go. Nor is one that the server does not end when it should:
// pings of HTTP/2 may be answered where requests are not.
func (r *reflected) watch(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	ctx, cancel := context.WithCancel(ctx)
	late := time.AfterFunc(r.conn.within, cancel)
	w, err := r.begin(ctx, o)
	if !late.Stop() && err != nil {
		err = r.conn.explain(context.DeadlineExceeded)
	}
	if err != nil {
		cancel()
		return nil, err
	}
	if s := o.TimeoutSeconds; s != nil {
		late.Reset(time.Duration(*s)*time.Second + r.conn.within)
	}
	return bounded{w, func() { late.Stop(); cancel() }}, nil
}

// bounded is a watch with what bounds it.
type bounded struct {
	watch.Interface
	end func()
}

// Stop ends it.
func (b bounded) Stop() {
	b.Interface.Stop()
	b.end()
}

func (r *reflected) begin(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	newest, err := r.list(ctx, metav1.ListOptions{Limit: 1})
	if err != nil {
		return nil, err
	}
	if revisionOf(newest) < revision(o.ResourceVersion) {
		return nil, apierrors.NewResourceExpired(fmt.Sprintf("revision %s, but the server is at %d", o.ResourceVersion,
			revisionOf(newest)))
	}
	o.Watch = true
	return r.request(o).Watch(ctx)
}

// report tells how the last list or watch went; the end of ctx is no failure.
func (r *reflected) report(ctx context.Context, err error) {
	if ctx.Err() == nil {
		r.send(func(s *state, now time.Time) { s.failed(r.name, err, now) })
	}
}

func (r *reflected) list(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	list := r.newList()
	if err := r.request(o).Timeout(wholeList * r.conn.within).Do(ctx).Into(list); err != nil {
		return nil, r.conn.explain(err)
	}
	return list, nil
}

func (r *reflected) request(o metav1.ListOptions) *rest.Request {
	if r.only != "" {
		o.FieldSelector = fields.OneTermEqualSelector(metav1.ObjectNameField, r.only).String()
	}
	return r.conn.client.Get().NamespaceIfScoped(r.namespace, r.namespace != "").Resource(r.name).
		VersionedParams(&o, metav1.ParameterCodec)
}

// Add, Update, Delete, Replace, Resync and UpdateResourceVersion are what the reflector calls.

func (r *reflected) Add(o any) error {
	r.send(func(s *state, _ time.Time) { r.put(s, o) })
	return nil
}

func (r *reflected) Update(o any) error { return r.Add(o) }

func (r *reflected) Delete(o any) error {
	m, err := meta.Accessor(o)
	if err != nil {
		return err
	}
	r.send(func(s *state, now time.Time) { r.drop(s, m.GetName(), now) })
	return nil
}

func (r *reflected) Replace(list []any, version string) error {
	all := make([]runtime.Object, 0, len(list))
	for _, o := range list {
		each(o, func(o runtime.Object) { all = append(all, o) })
	}
	r.send(func(s *state, now time.Time) {
		r.all(s, all, revision(version), now)
		r.seen(revision(version))
	})
	return nil
}

func (r *reflected) Resync() error { return nil }

// UpdateResourceVersion takes note that all up to a version was told, by a heartbeat or a bookmark as well.
func (r *reflected) UpdateResourceVersion(version string) { r.seen(revision(version)) }
