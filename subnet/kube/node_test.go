package kube

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/overlayd/overlayd/addr"
	"github.com/overlayd/overlayd/subnet"
)

// FuzzNode: whatever stands in the annotations and podCIDRs of a Node, there is an entry of that Node which says why it
// is rejected, or one whose subnets and addresses make sense.
func FuzzNode(f *testing.F) {
	f.Add("vxlan", `{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}`, "null", "192.0.2.1", "", "true", "id", "10.244.1.0/24", "")
	f.Add("host-gw", "null", `{"VtepMAC":7}`, "192.0.2.1", "2001:db8::1", "yes", "\x00", "10.244.1.0/24", "fd00::/64")
	f.Add("", "", "", "", "", "", "", "::ffff:10.0.0.0/120", "x")
	c, err := subnet.ParseConfig([]byte(`{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00::/48"}`))
	if err != nil {
		f.Fatal(err)
	}
	o := DefaultOptions()
	f.Fuzz(func(t *testing.T, kind, data, dataV6, ip, ipV6, local, id, cidr, cidrV6 string) {
		n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n", UID: "u", Annotations: map[string]string{}}}
		n.Spec.PodCIDRs = []string{cidr, cidrV6}
		for key, v := range map[string]string{
			keyManaged: "true", keyBackendType: kind, keyBackendData: data, keyBackendV6Data: dataV6, keyPublicIP: ip,
			keyPublicIPv6: ipV6, keyPublicIPLocal: local, keyNodeID: id,
		} {
			n.Annotations[ownPrefix+"/"+key] = v
		}
		o.settings(n.Annotations)
		e := o.read(n).entry("n", c)
		if e.NodeName != "n" {
			t.Fatalf("%+v is of another Node", e)
		}
		for _, fam := range addr.Families() {
			if p := e.Subnets.Get(fam); e.Err == nil && p.IsValid() && (p != p.Masked() || addr.FamilyOf(p.Addr()) != fam) {
				t.Fatalf("accepted %+v", e)
			}
		}
	})
}
