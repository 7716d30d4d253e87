package masquerade

import (
	"context"
	"fmt"
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
	Variant Variant // of iptables; VariantDefault: what the host uses
	Sets    Sets    // nil: another program keeps them
}

// lockWait is how long one run of iptables waits for the xtables lock.
const lockWait = 10 * time.Second

// New makes the driver that the options ask for. Where they leave a choice, the host decides. That starts no process
// but where both variants of iptables could be in use.
func New(ctx context.Context, o Options) (Driver, Decision) {
	d, early := Decision{o.Kind, o.Variant, "as configured"}, false
	if o.Kind == KindAuto || o.Kind == KindIPTables && o.Variant == VariantDefault {
		facts := gather(ctx)
		d = Decide(o.Kind, o.Variant, facts)
		early = o.Kind == KindAuto && d.Kind == KindIPTables && !facts.KubeProxyNFT
	}
	o.Kind, o.Variant = d.Kind, d.Variant
	driver := newDriver(o, openTables(lockWait))
	driver.early = early
	return driver, d
}

// Decision is which driver to use, and why.
type Decision struct {
	Kind    Kind // never KindAuto
	Variant Variant
	Reason  string
}

// Facts are what a decision rests on. What could not be found out is taken for not there.
type Facts struct {
	NFT          bool // the kernel has nf_tables
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
		return KindIPTables, "the kernel has no nf_tables"
	case !f.IPTablesNFT.Program && !f.Legacy.Program:
		return KindNFTables, "iptables not found"
	case f.KubeProxyNFT && !f.IPTablesNFT.KubeProxy && !f.Legacy.KubeProxy:
		return KindNFTables, "kube-proxy uses nftables"
	}
	return KindIPTables, "nothing on this host requires nftables"
}

// decideVariant asks in the order in which the Kubernetes images do (kubernetes-sigs/iptables-wrappers): the kubelet's
// hint, then where the rules are.
func decideVariant(f Facts) (Variant, string) {
	nft, legacy := f.IPTablesNFT, f.Legacy
	switch {
	case !nft.Program && !legacy.Program:
		return VariantDefault, "the host's default iptables"
	case !legacy.Program:
		return VariantNFT, "iptables-legacy not found"
	case !nft.Program:
		return VariantLegacy, "iptables-nft not found"
	case nft.KubeProxy != legacy.KubeProxy:
		return either(nft.KubeProxy), "kube-proxy uses it"
	case nft.Kubelet != legacy.Kubelet:
		return either(nft.Kubelet), "the kubelet uses it"
	case nft.Rules != legacy.Rules:
		return either(nft.Rules > legacy.Rules),
			fmt.Sprintf("most rules on this host use it (nft %d, legacy %d)", nft.Rules, legacy.Rules)
	}
	return VariantDefault, "the host's default iptables"
}

func either(nft bool) Variant {
	if nft {
		return VariantNFT
	}
	return VariantLegacy
}

// gather reads the facts, in the network namespace of the calling thread, and creates no table by that.
func gather(ctx context.Context) Facts {
	var f Facts
	_, err := generation()
	f.NFT = err == nil
	for _, fam := range addr.Families() {
		f.IPTablesNFT.Program = f.IPTablesNFT.Program || programThere(fam, VariantNFT)
		f.Legacy.Program = f.Legacy.Program || programThere(fam, VariantLegacy)
		f.KubeProxyNFT = f.KubeProxyNFT || kubeProxyNFT(fam)
		f.IPTablesNFT.find(fam)
		if names, _ := legacyNames(fam); len(names) > 0 {
			f.Legacy.save(ctx, fam, VariantLegacy)
		}
	}
	if nft, legacy := f.IPTablesNFT, f.Legacy; nft.Program && legacy.Program &&
		nft.KubeProxy == legacy.KubeProxy && nft.Kubelet == legacy.Kubelet {
		for _, fam := range addr.Families() { // makes no difference otherwise
			f.IPTablesNFT.save(ctx, fam, VariantNFT)
		}
	}
	return f
}

// kubeProxyNFT tells whether kube-proxy has its table in nftables.
func kubeProxyNFT(f addr.Family) bool {
	table, _ := findTable(f, "kube-proxy")
	return table != nil
}

// What kube-proxy and the kubelet are known by.
const (
	kubeServices = "KUBE-SERVICES"
	kubeHint     = "KUBE-IPTABLES-HINT"
	kubeCanary   = "KUBE-KUBELET-CANARY"
)

// ourPrefix is what the names of our chains begin with.
const ourPrefix = "OVERLAYD-"

// find asks nf_tables who uses iptables-nft.
func (v *VariantFacts) find(f addr.Family) {
	there := func(table Table, chain string) bool {
		c, err := findChain(f, string(table), chain)
		return err == nil && c != nil
	}
	v.KubeProxy = v.KubeProxy || there(NAT, kubeServices) || there(Filter, kubeServices)
	v.Kubelet = v.Kubelet || there("mangle", kubeHint) || there("mangle", kubeCanary)
}

// save lets iptables say who uses a variant, and how much. It makes the tables of iptables-legacy: only where they are.
func (v *VariantFacts) save(ctx context.Context, f addr.Family, variant Variant) {
	saved, err := execRun(ctx, "", programName(f, variant)+"-save")
	if err != nil {
		return
	}
	for line := range strings.Lines(saved) {
		switch {
		case strings.HasPrefix(line, ":"+kubeServices+" "):
			v.KubeProxy = true
		case strings.HasPrefix(line, ":"+kubeHint+" "), strings.HasPrefix(line, ":"+kubeCanary+" "):
			v.Kubelet = true
		case strings.HasPrefix(line, "-A ") && !strings.Contains(line, ourPrefix):
			v.Rules++
		}
	}
}
