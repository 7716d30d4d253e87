package masquerade

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/overlayd/overlayd/addr"
)

// Kind says which firewall holds the rules.
type Kind string

// The kinds.
const (
	KindAuto     Kind = "auto" // what the host and kube-proxy use
	KindIPTables Kind = "iptables"
	KindNFTables Kind = "nftables"
)

// ParseKind reads a kind from a flag.
func ParseKind(s string) (Kind, error) {
	switch k := Kind(s); k {
	case KindAuto, KindIPTables, KindNFTables:
		return k, nil
	}
	return "", fmt.Errorf("%q is not a firewall: expected auto, iptables or nftables", s)
}

// Options are what a driver is made of.
type Options struct {
	Kind    Kind
	Variant Variant       // of iptables; VariantDefault: what the host uses
	Wait    time.Duration // for the xtables lock; zero: DefaultWait
	Sets    Sets
	Watch   Watch // nil: nothing is heard, look each time
}

// New makes the driver that the options ask for. Where they leave a choice, the host is looked at once, which starts a
// few processes.
func New(ctx context.Context, o Options) (Driver, Decision) {
	d := Decision{o.Kind, o.Variant, "as configured"}
	if o.Kind == KindAuto || o.Kind == KindIPTables && o.Variant == VariantDefault {
		d = Decide(o.Kind, o.Variant, gather(ctx, execRun, newNFTTool()))
	}
	if d.Kind == KindNFTables {
		n := NewNFTables(o.Wait)
		n.sets, n.memory.watch = o.Sets, o.Watch
		return n, d
	}
	i := NewIPTables(d.Variant, o.Wait)
	i.sets, i.memory.watch = o.Sets, o.Watch
	return i, d
}

// Remove takes everything of ours out of every firewall, and the sets.
func Remove(ctx context.Context, wait time.Duration, sets Sets) error {
	d := NewIPTables(VariantDefault, wait)
	d.sets = sets
	return d.Remove(ctx)
}

// Decision is which driver to use, and why.
type Decision struct {
	Kind    Kind // never KindAuto
	Variant Variant
	Reason  string
}

// Facts are what a decision rests on. What could not be found out is taken for not there.
type Facts struct {
	NFT          bool // nft works
	KubeProxyNFT bool // kube-proxy has a table in nftables
	IPTablesNFT  VariantFacts
	Legacy       VariantFacts
}

// VariantFacts are about one variant of iptables, both families together.
type VariantFacts struct {
	Program   bool // is there
	KubeProxy bool // kube-proxy has its chains here
	Kubelet   bool // the kubelet says that this is the variant to use
	Rules     int  // that are not ours
}

// Decide chooses. In doubt it is iptables: that is what most of what has to live beside us uses.
func Decide(k Kind, v Variant, f Facts) Decision {
	if k == KindAuto {
		var reason string
		if k, reason = decideKind(f); k == KindNFTables {
			return Decision{k, v, reason}
		}
	}
	if k == KindNFTables {
		return Decision{k, v, "as configured"}
	}
	if v != VariantDefault {
		return Decision{k, v, "variant as configured"}
	}
	v, reason := decideVariant(f)
	return Decision{KindIPTables, v, reason}
}

func decideKind(f Facts) (Kind, string) {
	switch {
	case !f.NFT:
		return KindIPTables, "nft does not work here"
	case !f.IPTablesNFT.Program && !f.Legacy.Program:
		return KindNFTables, "there is no iptables here"
	case f.KubeProxyNFT && !f.IPTablesNFT.KubeProxy && !f.Legacy.KubeProxy:
		return KindNFTables, "kube-proxy uses nftables"
	}
	return KindIPTables, "nobody asks for nftables"
}

// decideVariant asks in the order in which the Kubernetes images do (kubernetes-sigs/iptables-wrappers): the kubelet's
// hint, then where the rules are.
func decideVariant(f Facts) (Variant, string) {
	nft, legacy := f.IPTablesNFT, f.Legacy
	switch {
	case !nft.Program && !legacy.Program:
		return VariantDefault, "whatever the host calls iptables"
	case !legacy.Program:
		return VariantNFT, "there is no iptables-legacy here"
	case !nft.Program:
		return VariantLegacy, "there is no iptables-nft here"
	case nft.KubeProxy != legacy.KubeProxy:
		return either(nft.KubeProxy), "kube-proxy uses it"
	case nft.Kubelet != legacy.Kubelet:
		return either(nft.Kubelet), "the kubelet uses it"
	case nft.Rules != legacy.Rules:
		return either(nft.Rules > legacy.Rules), fmt.Sprintf("most rules on this host are there (nft %d, legacy %d)", nft.Rules, legacy.Rules)
	}
	return VariantDefault, "whatever the host calls iptables"
}

func either(nft bool) Variant {
	if nft {
		return VariantNFT
	}
	return VariantLegacy
}

// gather looks at the host, in the network namespace of the calling thread. It makes nothing by looking.
func gather(ctx context.Context, run runner, nft nftTool) Facts {
	var f Facts
	f.NFT, f.KubeProxyNFT = gatherNFT(ctx, run, nft)
	for _, fam := range addr.Families() {
		f.IPTablesNFT.add(ctx, run, fam, VariantNFT)
		f.Legacy.add(ctx, run, fam, VariantLegacy)
	}
	return f
}

// gatherNFT tries what the driver will need, JSON among it, which nft may have been built without.
func gatherNFT(ctx context.Context, run runner, nft nftTool) (works, kubeProxy bool) {
	if _, err := nft.open(); err != nil {
		return false, false
	}
	out, err := run(ctx, "", nftProgram, "-j", "list", "tables")
	if err != nil {
		return false, false
	}
	err = eachNFTObject(out, func(kind string, o nftObject, _ bool) {
		kubeProxy = kubeProxy || kind == "table" && o.Name == "kube-proxy"
	})
	return err == nil, kubeProxy
}

func (v *VariantFacts) add(ctx context.Context, run runner, f addr.Family, variant Variant) {
	if !programThere(f, variant) {
		return
	}
	v.Program = true
	if variant == VariantLegacy && !anyLegacyTable(f) {
		return // to save them would make them
	}
	out, err := run(ctx, "", programName(f, variant)+"-save")
	if err != nil && !errors.Is(err, exec.ErrNotFound) {
		return
	}
	v.count(out)
}

func anyLegacyTable(f addr.Family) bool {
	for _, t := range []Table{NAT, Filter, "mangle"} {
		if there, err := legacyTable(f, t); there && err == nil {
			return true
		}
	}
	return false
}

// count reads what iptables-save prints.
func (v *VariantFacts) count(saved string) {
	for s := bufio.NewScanner(strings.NewReader(saved)); s.Scan(); {
		line := s.Text()
		switch {
		case strings.HasPrefix(line, ":KUBE-SERVICES "):
			v.KubeProxy = true
		case strings.HasPrefix(line, ":KUBE-IPTABLES-HINT "), strings.HasPrefix(line, ":KUBE-KUBELET-CANARY "):
			v.Kubelet = true
		case strings.HasPrefix(line, "-A ") && !strings.Contains(line, "OVERLAYD-"):
			v.Rules++
		}
	}
}
