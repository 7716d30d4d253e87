package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/internal/ownfile"
)

// SubnetEnv is what the daemon says of this node in subnet.env. A family that is not in use has no subnet.
type SubnetEnv struct {
	Networks addr.Per[[]netip.Prefix] // the pod network; flannel may name several, separated by commas
	Subnet   addr.Per[netip.Prefix]   // this node's part of it, without host bits
	MTU      int                      // of the pods, in bytes
	IPMasq   bool                     // the daemon masquerades what leaves the pod network
}

// Families lists the families in use.
func (e SubnetEnv) Families() []addr.Family {
	var used []addr.Family
	for _, f := range addr.Families() {
		if e.Subnet.Get(f).IsValid() {
			used = append(used, f)
		}
	}
	return used
}

const (
	minMTU = 68    // RFC 791: what every IPv4 link must carry
	maxMTU = 65535 // the largest IPv4 packet

	maxEnvSize = 64 << 10 // it has a dozen lines; a wrong path may lead to anything
)

// ParseSubnetEnv reads subnet.env as overlayd writes it, with each variable under OVERLAYD_ and FLANNEL_ (the former
// wins), or as flannel does, under FLANNEL_ alone. Other variables are passed over. Errors name the line and have nothing
// of its content: the path is the configuration's to choose, and it may be that of a secret.
func ParseSubnetEnv(text string) (SubnetEnv, error) {
	vars, err := readVars(text)
	if err != nil {
		return SubnetEnv{}, err
	}
	var env SubnetEnv
	for _, f := range addr.Families() {
		key := addr.Per[string]{V6: "IPV6_"}.Get(f)
		subnet, network := vars.get(key+"SUBNET"), vars.get(key+"NETWORK")
		if subnet.name == "" {
			continue
		}
		p, err := subnet.prefix(f, subnet.value)
		if err != nil {
			return SubnetEnv{}, err
		}
		env.Subnet.Set(f, p)
		if network.name == "" {
			return SubnetEnv{}, fmt.Errorf("line %d: %s without FLANNEL_%sNETWORK", subnet.line, subnet.name, key)
		}
		var networks []netip.Prefix
		for part := range strings.SplitSeq(network.value, ",") {
			p, err := network.prefix(f, part)
			if err != nil {
				return SubnetEnv{}, err
			}
			networks = append(networks, p)
		}
		env.Networks.Set(f, networks)
	}
	if len(env.Families()) == 0 {
		return SubnetEnv{}, errors.New("neither FLANNEL_SUBNET nor FLANNEL_IPV6_SUBNET is set")
	}
	mtu, masq := vars.get("MTU"), vars.get("IPMASQ")
	switch "" {
	case mtu.name:
		return SubnetEnv{}, errors.New("FLANNEL_MTU is not set")
	case masq.name:
		return SubnetEnv{}, errors.New("FLANNEL_IPMASQ is not set")
	}
	if env.MTU, err = strconv.Atoi(mtu.value); err != nil || env.MTU < minMTU || env.MTU > maxMTU {
		return SubnetEnv{}, mtu.expected(fmt.Sprintf("a number from %d to %d", minMTU, maxMTU))
	}
	if env.IPMasq = masq.value == "true"; !env.IPMasq && masq.value != "false" {
		return SubnetEnv{}, masq.expected("true or false")
	}
	return env, nil
}

// variable is one line. The zero value is one that is not there.
type variable struct {
	name, value string
	line        int
}

func (v variable) expected(what string) error {
	return fmt.Errorf("line %d: %s: expected %s", v.line, v.name, what)
}

func (v variable) prefix(f addr.Family, s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(strings.TrimSpace(s))
	if err != nil || addr.FamilyOf(p.Addr()) != f || p.Addr().Is4In6() {
		return netip.Prefix{}, v.expected(fmt.Sprintf("an %s network", f))
	}
	return p.Masked(), nil
}

type variables map[string]variable

// get finds a variable under one of the two prefixes.
func (v variables) get(name string) variable {
	if own, ok := v["OVERLAYD_"+name]; ok {
		return own
	}
	return v["FLANNEL_"+name]
}

func readVars(text string) (variables, error) {
	vars, n := variables{}, 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		if !ok {
			return nil, fmt.Errorf("line %d: expected NAME=VALUE", n)
		}
		vars[name] = variable{name: name, value: value, line: n}
	}
	return vars, nil
}

// waitForSubnetEnv reads the file, and waits for it if it is not there yet. What is there and makes no sense is not
// waited for: the daemon puts the file in place in one step.
func waitForSubnetEnv(path string, wait time.Duration) (SubnetEnv, error) {
	const poll = 50 * time.Millisecond
	for deadline := time.Now().Add(wait); ; time.Sleep(poll) {
		env, err := readSubnetEnv(path)
		if !errors.Is(err, fs.ErrNotExist) || !time.Now().Before(deadline) {
			return env, err
		}
	}
}

func readSubnetEnv(path string) (SubnetEnv, error) {
	text, err := ownfile.ReadLinked(path, maxEnvSize)
	if err != nil {
		return SubnetEnv{}, err
	}
	env, err := ParseSubnetEnv(string(text))
	if err != nil {
		return SubnetEnv{}, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("%s: %v", path, err), "")
	}
	return env, nil
}
