package kube

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/version"

	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/examine"
)

// Examine asks the API server, for at most as long as ctx. It changes nothing there.
func Examine(ctx context.Context, o Options) examine.Store {
	m, err := New(o, zap.NewNop())
	if err != nil {
		return examine.Store{OptionsErr: err}
	}
	defer m.Close()
	x := examine.Store{Endpoints: []examine.Endpoint{{URL: m.conn.server}}}
	e := &x.Endpoints[0]
	var wg sync.WaitGroup
	wg.Go(func() { m.conn.examine(ctx, e) })
	wg.Go(func() {
		if c := e.CompareClocks(ctx, &tls.Config{}); c != nil {
			x.Certificates = []examine.Certificate{examine.CertificateOf("the server at "+e.URL, "", c)}
		}
	})
	wg.Go(func() {
		x.Table, x.TableErr = m.List(ctx)
		x.NoConfig = errors.Is(x.Table.ConfigErr, subnet.ErrNoConfig)
	})
	wg.Go(func() { x.OwnErr = m.examineOwn(ctx) })
	wg.Go(func() { x.WriteErr = m.conn.tryWrites(ctx, o.Node) })
	wg.Wait()
	return x
}

// examine asks for the version, which any client may know.
func (c connection) examine(ctx context.Context, e *examine.Endpoint) {
	for range 2 { // the first request makes the connection
		began := time.Now()
		raw, err := c.client.Get().AbsPath("/version").SetHeader("Accept", "application/json").Do(ctx).Raw()
		if e.Err = c.explain(err); err != nil {
			return
		}
		e.Took = time.Since(began)
		var v version.Info
		if json.Unmarshal(raw, &v) == nil {
			e.Version = v.GitVersion
		}
	}
}

// examineOwn says what is wrong with the own Node. That Nodes can't be read is another matter.
func (m *Manager) examineOwn(ctx context.Context) error {
	nodes := m.nodes(nil)
	nodes.only = m.opts.Node
	list, err := nodes.list(ctx, metav1.ListOptions{})
	all, ok := list.(*corev1.NodeList)
	switch {
	case err != nil || !ok:
		return nil
	case len(all.Items) == 0:
		return fmt.Errorf("there is no Node %s: --node-name has to be the name of this machine's Node", m.opts.Node)
	case len(podCIDRs(&all.Items[0])) == 0:
		return fmt.Errorf("the Node %s has no podCIDRs: kube-controller-manager assigns them if it runs with "+
			"--allocate-node-cidrs and --cluster-cidr", m.opts.Node)
	}
	return nil
}

// tryWrites tries whether this client might write what it has to: permissions and admission policies are asked, and
// nothing is done. That there is no such Node is another matter.
func (c connection) tryWrites(ctx context.Context, node string) error {
	for _, subresource := range []string{"", "status"} {
		r := c.client.Patch(types.MergePatchType).Resource(nodesResource).Name(node).
			Param("dryRun", "All").Param("fieldManager", fieldManager)
		if subresource != "" {
			r = r.SubResource(subresource)
		}
		if err := r.Body([]byte("{}")).Do(ctx).Error(); err != nil && !apierrors.IsNotFound(err) {
			return c.explain(err)
		}
	}
	return nil
}
