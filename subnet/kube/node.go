package kube

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// The names of the annotations, without their prefix. All but the last two are those of flannel's kube subnet manager,
// with its meanings.
const (
	keyBackendType   = "backend-type"
	keyBackendData   = "backend-data"
	keyBackendV6Data = "backend-v6-data"
	keyPublicIP      = "public-ip"
	keyPublicIPv6    = "public-ipv6"
	keyManaged       = "kube-subnet-manager" // "true": the other values are those of a subnet manager

	keyPublicIPLocal = "public-ip-local"
	keyNodeID        = "node-id"
)

// The names of those that an operator sets, the addresses as in flannel.
const (
	keyInterface           = "interface"
	keyPublicIPOverwrite   = "public-ip-overwrite"
	keyPublicIPv6Overwrite = "public-ipv6-overwrite"
)

// The defaults of --kube-annotation-prefix, here and in flannel.
const (
	ownPrefix     = "overlayd.io"
	flannelPrefix = "flannel.alpha.coreos.com"
)

// announcement is what the annotations of a Node say of it, each as it stands there. The zero value: nothing.
type announcement struct {
	BackendType, BackendData, BackendV6Data string
	PublicIP, PublicIPv6                    string
	PublicIPLocal, NodeID                   string
}

// lease is the value of a lease in etcd, which says the same.
type lease struct {
	PublicIP      string          `json:",omitempty"`
	PublicIPv6    string          `json:",omitempty"`
	BackendType   string          `json:",omitempty"`
	BackendData   json.RawMessage `json:",omitempty"`
	BackendV6Data json.RawMessage `json:",omitempty"`
	NodeName      string          `json:",omitempty"`
	NodeID        string          `json:",omitempty"`
	PublicIPLocal bool            `json:",omitempty"`
}

// announce is the announcement that says a.
func announce(a subnet.Attrs) (announcement, error) {
	var l lease
	if err := json.Unmarshal(subnet.FormatValue(a), &l); err != nil {
		return announcement{}, fmt.Errorf("kube: announce %s: %w", a.NodeName, err)
	}
	data := func(ip string, raw json.RawMessage) string { // as flannel has it
		if ip == "" {
			return ""
		}
		return cmp.Or(string(raw), "null")
	}
	return announcement{
		BackendType: l.BackendType, BackendData: data(l.PublicIP, l.BackendData),
		BackendV6Data: data(l.PublicIPv6, l.BackendV6Data),
		PublicIP:      l.PublicIP, PublicIPv6: l.PublicIPv6,
		PublicIPLocal: strconv.FormatBool(l.PublicIPLocal), NodeID: l.NodeID,
	}, nil
}

// annotations are those that say it under a prefix. What is empty has none, so that the API server removes one of
// before.
func (a announcement) annotations(prefix string) map[string]string {
	out := map[string]string{}
	for key, v := range map[string]string{
		keyBackendType: a.BackendType, keyBackendData: a.BackendData, keyBackendV6Data: a.BackendV6Data,
		keyPublicIP: a.PublicIP, keyPublicIPv6: a.PublicIPv6, keyManaged: "true",
		keyPublicIPLocal: a.PublicIPLocal, keyNodeID: a.NodeID,
	} {
		if v != "" {
			out[prefix+"/"+key] = v
		}
	}
	return out
}

// prefixes are those under which other nodes may announce themselves, the own one first: nodes are moved from flannel
// one by one, and then from its prefix.
func prefixes(own string) []string {
	if own == flannelPrefix {
		return []string{own, ownPrefix}
	}
	return []string{own, flannelPrefix}
}

// announced reads the annotations of a Node, and says under which prefix they are. Complete ones precede the others: a
// node that writes under another prefix leaves those that flannel had written with the same value.
func announced(all map[string]string, prefix string) (a announcement, under string) {
	for _, p := range prefixes(prefix) {
		get := func(key string) string { return all[p+"/"+key] }
		if get(keyManaged) != "true" {
			continue
		}
		found := announcement{
			BackendType: get(keyBackendType), BackendData: get(keyBackendData), BackendV6Data: get(keyBackendV6Data),
			PublicIP: get(keyPublicIP), PublicIPv6: get(keyPublicIPv6),
			PublicIPLocal: get(keyPublicIPLocal), NodeID: get(keyNodeID),
		}
		if found.complete() {
			return found, p
		}
		if under == "" {
			a, under = found, p
		}
	}
	return a, under
}

// complete reports whether each address has its data.
func (a announcement) complete() bool {
	return (a.PublicIP == "") == (a.BackendData == "") && (a.PublicIPv6 == "") == (a.BackendV6Data == "")
}

// settings are what an operator has set for a node, each under the own prefix, or else under flannel's.
func (o Options) settings(all map[string]string) subnet.NodeSettings {
	get := func(key string) (s subnet.Setting) {
		for _, p := range []string{flannelPrefix, o.AnnotationPrefix} {
			if v := all[p+"/"+key]; v != "" {
				s = subnet.Setting{Name: "annotation " + p + "/" + key, Value: v}
			}
		}
		return s
	}
	return subnet.NodeSettings{
		Interface: get(keyInterface),
		PublicIP:  addr.Per[subnet.Setting]{V4: get(keyPublicIPOverwrite), V6: get(keyPublicIPv6Overwrite)},
	}
}

// value is the value of a lease in etcd that says the same of a node.
func (a announcement) value(node string) ([]byte, error) {
	for key, data := range map[string]string{keyBackendData: a.BackendData, keyBackendV6Data: a.BackendV6Data} {
		if data != "" && !json.Valid([]byte(data)) {
			return nil, fmt.Errorf("the annotation %s is not JSON: %.80q", key, data)
		}
	}
	return json.Marshal(lease{
		BackendType: a.BackendType, BackendData: json.RawMessage(a.BackendData),
		BackendV6Data: json.RawMessage(a.BackendV6Data), PublicIP: a.PublicIP, PublicIPv6: a.PublicIPv6,
		NodeName: node, NodeID: a.NodeID, PublicIPLocal: a.PublicIPLocal == "true",
	})
}

// record is what of a Node matters to its peers. Two that are equal mean the same.
type record struct {
	uid      types.UID
	podCIDRs string // separated by commas
	announcement
	prefix           string // of the annotations
	created, written int64  // Unix time in s; written is when a subnet manager changed the annotations last
}

// read takes from a Node what matters.
func (o Options) read(n *corev1.Node) record {
	r := record{uid: n.UID, podCIDRs: strings.Join(podCIDRs(n), ","), created: n.CreationTimestamp.Unix()}
	r.announcement, r.prefix = announced(n.Annotations, o.AnnotationPrefix)
	r.written = r.created
	for _, f := range n.ManagedFields {
		if managesSubnets(f) {
			r.written = max(r.written, f.Time.Unix())
		}
	}
	return r
}

func podCIDRs(n *corev1.Node) []string {
	if len(n.Spec.PodCIDRs) == 0 && n.Spec.PodCIDR != "" {
		return []string{n.Spec.PodCIDR}
	}
	return n.Spec.PodCIDRs
}

// managesSubnets reports whether fields of a Node are a subnet manager's: ours, among which the condition is not, or
// flannel's, which goes by its program's name and writes all as the status.
func managesSubnets(f metav1.ManagedFieldsEntry) bool {
	return f.Time != nil && isSubnetManager(f.Manager) && (f.Manager != fieldManager || f.Subresource == "")
}

func isSubnetManager(manager string) bool { return manager == fieldManager || manager == "flanneld" }

// entry is what a lease of this node is in the table. A Node that nothing is announced of is a reservation: its subnets
// are taken, and nothing leads there yet. All stay without being renewed. The config is that of the network.
func (r record) entry(name string, c subnet.Config) *subnet.Entry {
	subnets, cidrErr := r.subnetsIn(c)
	var value []byte
	var valueErr error
	if r.announcement != (announcement{}) {
		value, valueErr = r.value(name)
	}
	e := subnet.ParseEntry(subnet.FormatKey(subnets), value, r.written, r.created, 0)
	e.NodeName, e.Subnets = name, subnets
	e.Err = cmp.Or(cidrErr, valueErr, e.Err)
	return e
}

// subnetsIn are the pod CIDRs of the families that a network uses, as the own lease has them. Of a node without one, they
// are all: the entry is rejected for that.
func (r record) subnetsIn(c subnet.Config) (addr.Per[netip.Prefix], error) {
	all, err := r.subnets()
	return cmp.Or(c.Used(all), all), err
}

// subnets are the pod CIDRs, one of each family at most.
func (r record) subnets() (out addr.Per[netip.Prefix], err error) {
	for cidr := range strings.SplitSeq(r.podCIDRs, ",") {
		p, err := netip.ParsePrefix(cidr)
		if err != nil || p.Masked() != p || p.Addr().Is4In6() || out.Get(addr.FamilyOf(p.Addr())).IsValid() {
			return out, fmt.Errorf("its podCIDRs are %q: expected one network of a family", r.podCIDRs)
		}
		out.Set(addr.FamilyOf(p.Addr()), p)
	}
	return out, nil
}

// networkUnavailable is the condition of that name; nil: the Node has none.
func networkUnavailable(n *corev1.Node) *corev1.NodeCondition {
	i := slices.IndexFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeNetworkUnavailable
	})
	if i < 0 {
		return nil
	}
	return &n.Status.Conditions[i]
}
