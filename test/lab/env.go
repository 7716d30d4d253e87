package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// SubnetEnv is what overlayd tells a node's pods through subnet.env.
type SubnetEnv struct {
	Gateway addr.Per[netip.Prefix] // the node's subnet in gateway form: 10.244.5.1/24
	MTU     int
}

// ParseSubnetEnv reads subnet.env for the given families.
func ParseSubnetEnv(text string, families []addr.Family) (SubnetEnv, error) {
	vars := map[string]string{}
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			vars[key] = value
		}
	}
	var env SubnetEnv
	var errs []error
	for _, f := range families {
		key := subnetKey(f)
		p, err := netip.ParsePrefix(vars[key])
		if err != nil || addr.FamilyOf(p.Addr()) != f {
			errs = append(errs, fmt.Errorf("%s=%q: want an %s subnet", key, vars[key], f))
		}
		env.Gateway.Set(f, p)
	}
	mtu, err := strconv.Atoi(vars["FLANNEL_MTU"])
	if err != nil || mtu <= 0 {
		errs = append(errs, fmt.Errorf("FLANNEL_MTU=%q: want a number", vars["FLANNEL_MTU"]))
	}
	env.MTU = mtu
	return env, errors.Join(errs...)
}

func subnetKey(f addr.Family) string {
	if f == addr.IPv4 {
		return "FLANNEL_SUBNET"
	}
	return "FLANNEL_IPV6_SUBNET"
}

// PodAddr is the address of pod number i (from 0) of the node: the ones that follow the gateway's.
func (e SubnetEnv) PodAddr(f addr.Family, i int) netip.Prefix {
	gw := e.Gateway.Get(f)
	a := gw.Addr().Next()
	for range i {
		a = a.Next()
	}
	return netip.PrefixFrom(a, gw.Bits())
}
