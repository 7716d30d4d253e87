package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/spf13/pflag"
	"go.uber.org/zap"

	"github.com/overlayd/overlayd/agent"
	"github.com/overlayd/overlayd/diag/doctor"
	"github.com/overlayd/overlayd/diag/status"
	"github.com/overlayd/overlayd/subnet"
	"github.com/overlayd/overlayd/subnet/etcd"
	"github.com/overlayd/overlayd/subnet/kube"
)

// store is what the daemon and its commands need of either store.
type store interface {
	subnet.Manager
	agent.Traffic
	Endpoints() []string
	List(ctx context.Context) (subnet.Table, error)
	Close()
}

// newStore checks the options. It does not connect.
func newStore(o doctor.Store, log *zap.Logger) (store, error) {
	if o.Kind == status.Kubernetes {
		return kube.New(o.Kube, log)
	}
	return etcd.New(o.Etcd, log)
}

func (f *flags) addStore(s *pflag.FlagSet) {
	s.Var(parse(string(status.Etcd), func(text string) error {
		f.store.Kind = status.StoreKind(text)
		if f.store.Kind != status.Etcd && f.store.Kind != status.Kubernetes {
			return expected("etcd or kubernetes", text)
		}
		return nil
	}), "store", "Lease `store`: etcd, or kubernetes, where the podCIDRs of Nodes are the subnets")
	o := &f.store.Etcd
	s.StringSliceVar(&o.Endpoints, "etcd-endpoints", []string{"http://127.0.0.1:2379"},
		"etcd endpoint `URLs`, comma-separated")
	s.StringVar(&o.Prefix, "etcd-prefix", etcd.DefaultPrefix, "Key `prefix` of the network in etcd")
	s.StringVar(&o.CertFile, "etcd-certfile", "", "Client certificate `file` (PEM); reloaded when it changes")
	s.StringVar(&o.KeyFile, "etcd-keyfile", "", "Client key `file` (PEM); reloaded when it changes")
	s.StringVar(&o.CAFile, "etcd-cafile", "", "CA certificate `file` to verify etcd (PEM); reloaded when it changes")
	s.StringVar(&o.Username, "etcd-username", "", "etcd user `name`")
	s.StringVar(&o.Password, "etcd-password", "",
		"etcd `password`; visible to all users of the node: prefer --etcd-password-file")
	s.StringVar(&o.PasswordFile, "etcd-password-file", "",
		"Read the etcd password from this `file`; reloaded when etcd rejects it")
	ownedBy(s, status.Etcd, "etcd-endpoints", "etcd-prefix", "etcd-certfile", "etcd-keyfile", "etcd-cafile",
		"etcd-username", "etcd-password", "etcd-password-file")
	k, deflt := &f.store.Kube, kube.DefaultOptions()
	s.StringVar(&k.Kubeconfig, "kubeconfig", deflt.Kubeconfig,
		"Kubeconfig `file` to reach the API server (default: the pod's service account)")
	s.StringVar(&k.AnnotationPrefix, "kube-annotation-prefix", deflt.AnnotationPrefix,
		"Annotation `prefix` on Nodes; flannel.alpha.coreos.com while flannel runs on other nodes")
	s.StringVar(&k.ConfigMap, "kube-config-map", deflt.ConfigMap,
		"ConfigMap (`NAMESPACE/NAME`) whose key net-conf.json is the network config")
	ownedBy(s, status.Kubernetes, "kubeconfig", "kube-annotation-prefix", "kube-config-map")
}

// ofStore is the annotation of a flag that belongs to one store.
const ofStore = "store"

// ownedBy marks flags that belong to one store, for --help too.
func ownedBy(s *pflag.FlagSet, kind status.StoreKind, names ...string) {
	for _, name := range names {
		x := s.Lookup(name)
		x.Usage = fmt.Sprintf("[%s] %s", kind, x.Usage)
		x.Annotations = map[string][]string{ofStore: {string(kind)}}
	}
}

// ownedFlags are the given flags that belong to one store.
func ownedFlags(s *pflag.FlagSet) map[status.StoreKind][]string {
	out := map[status.StoreKind][]string{}
	s.VisitAll(func(x *pflag.Flag) {
		if owner := x.Annotations[ofStore]; len(owner) > 0 && x.Changed && x.Value.String() != x.DefValue {
			kind := status.StoreKind(owner[0])
			out[kind] = append(out[kind], "--"+x.Name)
		}
	})
	return out
}

// checkStore refuses flags of another store than the one in use. It may be that one that is meant, and nodes with
// different stores do not find each other.
func (f *flags) checkStore(inUse status.StoreKind) error {
	for _, kind := range []status.StoreKind{status.Etcd, status.Kubernetes} {
		if names := f.owned[kind]; kind != inUse && len(names) > 0 {
			return usageError{fmt.Errorf("--store is %s, and these are for --store=%s: %s", inUse, kind,
				strings.Join(names, ", "))}
		}
	}
	return nil
}

// daemonSoon is how long a command waits for the daemon to say where the store is.
const daemonSoon = 3 * time.Second

// openStore finds the store as doctor does, and says who this node is, as far as that is known.
func (f *flags) openStore(ctx context.Context) (store, subnet.Identity, error) {
	s := f.settings()
	ctx, cancel := context.WithTimeout(ctx, daemonSoon)
	defer cancel()
	var daemon status.Node
	if err := (client{f.socket}).get(ctx, "/status", &daemon); err == nil {
		s.Identity = subnet.Identity{NodeName: daemon.Name, NodeID: daemon.ID}
	} else if f.missedFile() {
		return nil, s.Identity, usageError{fmt.Errorf("--env-file, --etcd-endpoints: %w", f.file.err)}
	}
	o := s.StoreOptions(daemon.Store)
	if err := f.checkStore(o.Kind); err != nil {
		return nil, s.Identity, err
	}
	m, err := newStore(o, zap.NewNop())
	if err != nil {
		return nil, s.Identity, usageError{err}
	}
	return m, s.Identity, nil
}

// missedFile reports whether this user may not read the environment file, so that it is not known where the store is.
func (f *flags) missedFile() bool {
	said := slices.Contains(f.given, "store") || len(f.owned) > 0
	return errors.Is(f.file.err, fs.ErrPermission) && !said
}
