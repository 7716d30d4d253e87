package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/overlayd/overlayd/agent/state"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/internal/ownfile"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
	"github.com/overlayd/overlayd/subnet/examine"
	"github.com/overlayd/overlayd/subnet/kube"
)

// Store says which store there is, and how it is reached. The options of another kind than Kind count for nothing.
type Store struct {
	Kind status.StoreKind
	Etcd etcd.Options
	Kube kube.Options
}

// Network identifies the network among those of all stores, for the persisted state.
func (o Store) Network() string {
	if o.Kind == status.Kubernetes {
		return state.Kubernetes
	}
	return etcd.CleanPrefix(o.Etcd.Prefix)
}

// Status is what the daemon tells of it to its commands, which find the store by that.
func (o Store) Status() status.Store {
	if o.Kind == status.Kubernetes {
		return status.Store{Kind: o.Kind, ConfigMap: o.Kube.ConfigMap}
	}
	return status.Store{Kind: o.Kind, Endpoints: o.Etcd.Endpoints, Prefix: etcd.CleanPrefix(o.Etcd.Prefix)}
}

// Exposed says which of the secrets that the store is reached with others can read.
func (o Store) Exposed() (out []Exposure) {
	type file struct{ flag, path string }
	files := []file{{"--kubeconfig", o.Kube.Kubeconfig}}
	if o.Kind != status.Kubernetes {
		files = []file{{"--etcd-keyfile", o.Etcd.KeyFile}, {"--etcd-password-file", o.Etcd.PasswordFile}}
	}
	for _, f := range files {
		if mode, exposed := ownfile.Exposed(f.path); exposed {
			out = append(out, Exposure{fmt.Sprintf("%s %s is open to other users (mode %#o)", f.flag, f.path, mode), f.path})
		}
	}
	for _, e := range o.Etcd.Endpoints {
		u, err := url.Parse(e)
		if o.Kind == status.Kubernetes || err != nil || o.Etcd.Username == "" || u.Scheme == "https" {
			continue
		}
		if ip, err := netip.ParseAddr(u.Hostname()); u.Hostname() != "localhost" && (err != nil || !ip.IsLoopback()) {
			out = append(out, Exposure{Text: e + " gets the password in plain text: any host on the way can read it"})
		}
	}
	return out
}

// Exposure is a secret that others can read, and the file that it is in, if any.
type Exposure struct{ Text, File string }

// StoreOptions say where the store is: as the daemon does where one runs, but for what the command line gives. Every
// command that needs the store finds it so.
func (s Settings) StoreOptions(daemon status.Store) Store {
	given := func(flag string) bool { return slices.Contains(s.Given, flag) }
	o := s.Store
	theirs := cmp.Or(daemon.Kind, o.Kind)
	if !given("store") {
		o.Kind = theirs
	}
	o.Etcd.InitConfig, o.Kube.Node = nil, s.Identity.NodeName
	if o.Kind != theirs {
		return o
	}
	if !given("etcd-endpoints") && o.Kind == status.Etcd && len(daemon.Endpoints) > 0 {
		o.Etcd.Endpoints = daemon.Endpoints
	}
	if !given("etcd-prefix") {
		o.Etcd.Prefix = cmp.Or(daemon.Prefix, o.Etcd.Prefix)
	}
	if !given("kube-config-map") {
		o.Kube.ConfigMap = cmp.Or(daemon.ConfigMap, o.Kube.ConfigMap)
	}
	return o
}

func (f Facts) storeOptions() Store { return f.StoreOptions(f.Daemon.Status.Store) }

func (f Facts) kubeStore() bool { return f.storeOptions().Kind == status.Kubernetes }

// examineStore asks the store, for as long as askStoreFor.
func examineStore(ctx context.Context, o Store) <-chan examine.Store {
	out := make(chan examine.Store, 1)
	go func() {
		ctx, cancel := context.WithTimeout(ctx, askStoreFor)
		defer cancel()
		if o.Kind == status.Kubernetes {
			out <- kube.Examine(ctx, o.Kube)
			return
		}
		o.Etcd.RequestTimeout = askStoreFor
		out <- etcd.Examine(ctx, o.Etcd)
	}()
	return out
}

// sameStore reports whether two ask the same store: the daemon may know another one than the settings.
func sameStore(a, b Store) bool {
	return a.Kind == b.Kind && slices.Equal(a.Etcd.Endpoints, b.Etcd.Endpoints) && a.Etcd.Prefix == b.Etcd.Prefix &&
		a.Kube == b.Kube
}

// endpoints are the URLs of the store.
func (f Facts) endpoints() (urls []string) {
	for _, e := range f.Store.Endpoints {
		urls = append(urls, e.URL)
	}
	return urls
}

// storeName is what to call the store in a sentence.
func (f Facts) storeName() string {
	if f.kubeStore() {
		return "the Kubernetes API"
	}
	return "etcd"
}

// etcdctl is a command line with the node's own settings. A password is asked for.
func (f Facts) etcdctl(format string, args ...any) string {
	o := f.storeOptions().Etcd
	s := "etcdctl --endpoints=" + strings.Join(o.Endpoints, ",")
	for _, x := range [][2]string{{"--cacert=", o.CAFile}, {"--cert=", o.CertFile}, {"--key=", o.KeyFile}} {
		switch {
		case x[1] == "":
		case f.Service.inKubernetes(): // the pod has no etcdctl: elsewhere, the files of its secret are at hand by name
			s += " " + x[0] + filepath.Base(x[1])
		default:
			s += " " + x[0] + x[1]
		}
	}
	if o.Username != "" {
		s += " --user=" + o.Username
	}
	return s + " " + fmt.Sprintf(format, args...)
}

func (f Facts) prefix() string { return etcd.CleanPrefix(f.storeOptions().Etcd.Prefix) }

// configKey is where the network config is.
func (f Facts) configKey() string {
	if f.kubeStore() {
		return "the ConfigMap " + f.storeOptions().Kube.ConfigMap
	}
	return f.prefix() + "/config"
}

// kubectlConfig is a command about the ConfigMap.
func (f Facts) kubectlConfig(verb, rest string) string {
	namespace, name, _ := strings.Cut(f.storeOptions().Kube.ConfigMap, "/")
	return fmt.Sprintf("kubectl -n %s %s configmap %s %s", namespace, verb, name, rest)
}

// showConfig shows the network config.
func (f Facts) showConfig() string {
	if f.kubeStore() {
		return f.kubectlConfig("get", "-o yaml")
	}
	return f.etcdctl("get %s/config", f.prefix())
}

// putConfig writes a network config, whether there is one or not. Other keys of a ConfigMap stay: flannel's has one.
func (f Facts) putConfig(config string) string {
	quoted := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	switch {
	case !f.kubeStore():
		return f.etcdctl("put %s/config %s", f.prefix(), quoted(config))
	case f.Store.NoConfig:
		return f.kubectlConfig("create", "--from-literal=net-conf.json="+quoted(config))
	}
	patch, _ := json.Marshal(map[string]any{"data": map[string]string{"net-conf.json": config}}) // strings are JSON
	return f.kubectlConfig("patch", "--type=merge -p "+quoted(string(patch)))
}

// restoreConfig writes the last config that is known, or shows the one in the store.
func (f Facts) restoreConfig() string {
	if f.persistedConfig() != nil {
		return f.putConfig(string(f.Persisted.Config))
	}
	return f.showConfig()
}

// showLeases shows all leases as they are in the store.
func (f Facts) showLeases() string {
	if f.kubeStore() {
		return "kubectl get nodes -o yaml"
	}
	return f.etcdctl("get --prefix %s/subnets/", f.prefix())
}

// storeHealth shows how the store is.
func (f Facts) storeHealth() string {
	if f.kubeStore() {
		return "kubectl get --raw '/readyz?verbose'"
	}
	return f.etcdctl("endpoint health")
}

// removal is how to remove a lease.
func (f Facts) removal(e *subnet.Entry) string {
	if f.kubeStore() {
		return fmt.Sprintf("kubectl delete node %s   # if that machine is gone", e.NodeName)
	}
	return f.etcdctl("del '%s/subnets/%s'", f.prefix(), e.Key) + "   # if no node uses it"
}

// noNodeLease says why no lease of this node was found in Kubernetes.
func (f Facts) noNodeLease() findings {
	name := f.Identity.NodeName
	i := slices.IndexFunc(f.Store.Table.Entries, func(e *subnet.Entry) bool { return e.NodeName == name })
	if i < 0 || f.Store.OwnErr != nil {
		return fail("%v", cmp.Or(f.Store.OwnErr, errors.New("the Node announces nothing"))).fix("kubectl get nodes")
	}
	switch e := f.Store.Table.Entries[i]; {
	case e.Err != nil:
		return fail("the Node %s: %v", name, e.Err).fix("kubectl get node %s -o yaml", name)
	case e.Blank() && f.Daemon.Running:
		return fail("the Node %s has its podCIDRs, and the daemon announces nothing of it: no pod can start here", name).
			fix("overlayd status")
	case e.Blank():
		return warn("the Node %s has its podCIDRs, and announces nothing yet; it does when overlayd starts", name)
	}
	return fail("the Node %s announces the machine %q, and this one is %q: two machines have one name, or this one was "+
		"reinstalled", name, f.Store.Table.Entries[i].NodeID, f.Identity.NodeID).fix("overlayd status")
}
